import { mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { engine } from '../engine/engine.ts'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import type { LatentNormalisation } from '../flow/normalise.ts'
import { ioError, writeFileAtomically } from '../io/atomic.ts'
import { openSafetensors, writeSafetensors } from '../io/safetensors.ts'
import type { CausalVideoVAE } from '../models/causal-vae.ts'
import { cast } from '../ops/cast.ts'
import { embedding } from '../ops/embedding.ts'
import { framesDecode } from '../ops/frames.ts'
import { keep, scope } from '../tensor/scope.ts'
import { noGrad } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { Dataset } from './dataset.ts'
import type { LatentBucket, LatentSource } from './latent-source.ts'

interface CacheIndex {
  /** [C, T, H, W] of every clip. */
  shape: number[]
  captions: string[]
  normalisation: LatentNormalisation
}

const FILE = 'latents.safetensors'
const INDEX = 'index.json'

/**
 * Encodes every clip once and writes posterior means and log-variances (bf16, un-normalised) with captions and the
 * normalisation constants that make them zero-mean and unit-variance, the first frame apart from the rest.
 * @throws ERR_ABORTED, ERR_IO; nothing is left under the final names then.
 */
export async function encodeLatents(
  vae: CausalVideoVAE,
  data: Dataset,
  out: string,
  options: { signal?: AbortSignal; onProgress?: (done: number, total: number) => void } = {},
): Promise<void> {
  await mkdir(out, { recursive: true }).catch((error: unknown) => {
    throw ioError(error, 'make latent cache', out)
  })
  const { frames, height, width } = data.options
  const captions: string[] = []
  let shape: number[] = []
  const stores: { mean: Uint16Array[]; logvar: Uint16Array[] } = { mean: [], logvar: [] }
  const sums = { image: [0, 0, 0], video: [0, 0, 0] }
  const ahead = new Ahead(data.length, (i) => data.load(i, options.signal))
  for (let i = 0; i < data.length; i++) {
    throwIfAborted(options.signal, 'encoding')
    const clip = await ahead.next()
    const posterior = noGrad(() =>
      scope(() => {
        const x = framesDecode(Tensor.from(clip, [1, frames, height, width, 3]))
        const p = vae.encode(cast(x, vae.dtype))
        return { mean: cast(p.mean, 'bf16'), logvar: cast(p.logvar, 'bf16') }
      }),
    )
    shape = [...posterior.mean.shape.slice(1)]
    const values = await posterior.mean.floats()
    addMoments(values, shape, sums)
    for (const key of ['mean', 'logvar'] as const) {
      const bits = new Uint16Array(posterior[key].size)
      await engine.read(posterior[key].storage, posterior[key].byteOffset, bits)
      stores[key].push(bits)
      posterior[key].dispose()
    }
    captions.push(data.item(i).text)
    options.onProgress?.(i + 1, data.length)
  }
  const constants = (s: number[]): { shift: number; scale: number } => {
    const [n, sum, squares] = s as [number, number, number]
    const shift = sum / n
    return { shift, scale: 1 / Math.sqrt(Math.max(squares / n - shift * shift, 1e-12)) }
  }
  const index: CacheIndex = {
    shape,
    captions,
    normalisation: {
      image: constants(sums.image),
      video: constants(sums.video[0] ? sums.video : sums.image),
    },
  }
  await writeSafetensors(
    join(out, FILE),
    (['mean', 'logvar'] as const).map((name) => ({
      name,
      dtype: 'BF16' as const,
      shape: [captions.length, ...shape],
      data: () => joined(stores[name]),
    })),
  )
  await writeFileAtomically(join(out, INDEX), `${JSON.stringify(index, null, 1)}\n`)
}

/** Starts a few loads ahead of the one that is waited for. */
class Ahead<T> {
  readonly #pending: Promise<T>[] = []
  readonly #count: number
  readonly #load: (i: number) => Promise<T>
  #started = 0

  constructor(count: number, load: (i: number) => Promise<T>) {
    this.#count = count
    this.#load = load
  }

  async next(): Promise<T> {
    while (this.#started < this.#count && this.#pending.length < 3) {
      const promise = this.#load(this.#started++)
      promise.catch(() => undefined)
      this.#pending.push(promise)
    }
    return await (this.#pending.shift() as Promise<T>)
  }
}

function addMoments(values: Float32Array, shape: number[], sums: { image: number[]; video: number[] }): void {
  const [channels, frames, h, w] = shape as [number, number, number, number]
  const area = h * w
  for (let c = 0; c < channels; c++) {
    for (let t = 0; t < frames; t++) {
      const s = t === 0 ? sums.image : sums.video
      for (let i = 0; i < area; i++) {
        const v = values[(c * frames + t) * area + i] as number
        s[0] = (s[0] as number) + 1
        s[1] = (s[1] as number) + v
        s[2] = (s[2] as number) + v * v
      }
    }
  }
}

function joined(parts: Uint16Array[]): Uint16Array {
  const all = new Uint16Array(parts.reduce((n, p) => n + p.length, 0))
  let at = 0
  for (const part of parts) {
    all.set(part, at)
    at += part.length
  }
  return all
}

/** A latent cache in native memory: batches are gathered there, nothing passes through JavaScript. */
export class LatentDataset implements LatentSource {
  readonly captions: readonly string[]
  /** [C, T, H, W]. */
  readonly shape: readonly number[]
  readonly normalisation: LatentNormalisation
  readonly #mean: Tensor
  readonly #logvar: Tensor
  readonly #file: number

  private constructor(index: CacheIndex, mean: Tensor, logvar: Tensor, file: number) {
    this.captions = index.captions
    this.shape = index.shape
    this.normalisation = index.normalisation
    this.#mean = mean
    this.#logvar = logvar
    this.#file = file
  }

  get length(): number {
    return this.captions.length
  }

  get buckets(): readonly LatentBucket[] {
    return [{ shape: this.shape, indices: Int32Array.from(this.captions, (_, i) => i) }]
  }

  /** @throws ERR_IO, ERR_CHECKPOINT when the folder is not a latent cache of this package. */
  static async open(dir: string): Promise<LatentDataset> {
    let index: CacheIndex
    try {
      index = JSON.parse(await readFile(join(dir, INDEX), 'utf8')) as CacheIndex
    } catch (error) {
      throw ioError(error, 'read latent cache (make it with `pyraflow encode`)', join(dir, INDEX))
    }
    const path = join(dir, FILE)
    const header = openSafetensors(path)
    const file = engine.openFile(path)
    const rows = index.captions.length
    const table = (name: string): Tensor => {
      const entry = header.entries.get(name)
      const expected = [rows, ...index.shape]
      if (entry?.dtype !== 'BF16' || entry.shape.join() !== expected.join()) {
        throw new PyraflowError('ERR_CHECKPOINT', {
          what: `${path}: ${name}`,
          expected: `bf16 [${expected}]`,
          received: entry ? `${entry.dtype} [${entry.shape}]` : 'nothing',
          remedy: 'Encode the data set again.',
        })
      }
      return keep(Tensor.mapped(file.id, entry.begin, [rows, index.shape.reduce((a, b) => a * b, 1)], 'bf16'))
    }
    return new LatentDataset(index, table('mean'), table('logvar'), file.id)
  }

  /** Posterior of the clips at `indices`: mean and logvar, f32 [B, C, T, H, W]. */
  gather(indices: readonly number[]): { mean: Tensor; logvar: Tensor } {
    const rows = Tensor.from(Int32Array.from(indices))
    const pick = (table: Tensor): Tensor => {
      const flat = cast(embedding(table, rows), 'f32')
      return flat.view([indices.length, ...this.shape])
    }
    return { mean: pick(this.#mean), logvar: pick(this.#logvar) }
  }

  dispose(): void {
    this.#mean.dispose()
    this.#logvar.dispose()
    engine.closeFile(this.#file)
  }
}
