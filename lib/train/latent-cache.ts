import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import type { LatentNormalisation } from '../flow/normalise.ts'
import { hashFile } from '../io/fingerprint.ts'
import type { CausalVideoVAE } from '../models/causal-vae.ts'
import type { VaePieces } from '../models/vae-plan.ts'
import { emitWarning } from '../text/encoder.ts'
import { ahead, DECODERS } from './ahead.ts'
import type { BadItem } from './bad-items.ts'
import { type Bucket, bucketName } from './buckets.ts'
import { SHARDS, shardsOf, writeIndex } from './cache-index.ts'
import type { Dataset } from './dataset.ts'
import { type EncodedClip, encodeClip, encoderHash, latentShape, type Moments } from './encode-clip.ts'
import { LATENTS, type LatentIndex, type LatentLine } from './latents.ts'
import { Filling, type RowFacts, type Rows, ShardFolder } from './shards.ts'

// Decoded clips that wait for the VAE may take so many bytes.
const HELD_BYTES = 512 * 2 ** 20

/** Latents in a cache folder that cannot be used any more, and which settings differ. */
export interface StaleLatents {
  readonly clips: number
  /** `vae`, `size`, `fps`, `dtype`, `short`, `decoder`, `tile`, `window`. */
  readonly because: readonly string[]
}

export interface EncodeLatentsOptions extends VaePieces {
  signal?: AbortSignal | undefined
  /** Clips done or left out, of all. */
  onProgress?: ((done: number, total: number) => void) | undefined
  /** Is told before the first clip when latents of an earlier call do not fit; default: a process warning. */
  onStale?: ((stale: StaleLatents) => void) | undefined
}

/** What {@link encodeLatents} did. */
export interface EncodedLatents {
  /** Clips in the cache. */
  readonly clips: number
  /** Of these: encoded by this call, and found in the folder. */
  readonly encoded: number
  readonly reused: number
  /** Bytes of the latents in the folder; clips of the same bytes are kept once. */
  readonly bytes: number
  /** Entries of the data set that were left out. */
  readonly bad: readonly BadItem[]
  readonly stale: StaleLatents | null
}

/** What latents depend on besides the file; part of every key. */
interface Settings {
  readonly [name: string]: unknown
  readonly vae: string
  readonly width: number
  readonly height: number
  readonly frames: number
}

/**
 * Encodes the clips of a data set into the folder `out`: posterior means and log-variances (bf16, not normalised) in
 * safetensors shards, and an index of captions with the normalisation that makes the means zero-mean and unit-variance,
 * the first frames apart from the rest. What is in the folder is used where the bytes of the clip, the VAE, size and rate
 * are the same, so that an interrupted call goes on where it was: the finished folder has the same bytes either way.
 * Until then the folder opens as it was before. Clips are decoded while others are encoded.
 *
 * @throws ERR_OPTION for a bucket that the VAE cannot encode; ERR_IO for a clip that cannot be used, unless the data set may
 *   leave it out, and for a folder that cannot be written to; ERR_MEMORY; ERR_ABORTED
 */
export async function encodeLatents(
  vae: CausalVideoVAE,
  data: Dataset,
  out: string,
  options: EncodeLatentsOptions = {},
): Promise<EncodedLatents> {
  const { signal, onProgress, onStale = warnOfStale, ...pieces } = options
  for (const bucket of data.buckets) checkBucket(vae, bucket)
  const settings = await settingsOf(vae, data, pieces, signal)
  const store = await ShardFolder.open(join(out, SHARDS), LATENTS)
  const stale = findStale(store, settings)
  if (stale) onStale(stale)

  const kept = await shardsOf(out, LATENTS)
  const fillings = data.buckets.map(() => new Filling(store, kept))
  const lines: LatentLine[] = []
  let [done, encoded, reused] = [0, 0, 0]
  const fetch = async (i: number, stop: AbortSignal): Promise<Fetched | undefined> => {
    try {
      const content = await hashFile(data.item(i).path, stop)
      const key = keyOf(content, settings[data.bucketOf(i)] as Settings)
      return { i, key, clip: store.has(key) ? undefined : await data.load(i, stop) }
    } catch (error) {
      data.reject(i, error)
      return undefined
    }
  }
  const largest = Math.max(...data.buckets.map((b) => 3 * b.width * b.height * b.frames))
  const hold = Math.max(1, Math.min(2 * DECODERS, Math.floor(HELD_BYTES / largest)))
  for await (const fetched of ahead(data.length, fetch, { parallel: DECODERS, hold, signal })) {
    throwIfAborted(signal, 'encoding')
    if (fetched) {
      const { i, key, clip } = fetched
      const b = data.bucketOf(i)
      if (clip && !store.has(key)) {
        const made = await encodeClip(vae, clip, data.buckets[b] as Bucket, { ...pieces, signal })
        await store.write(rowsOf([key], made, [made.moments], settings[b] as Settings), signal)
        encoded++
      } else reused++
      await (fillings[b] as Filling).add(key, signal)
      lines.push({ key, clip: data.item(i).name, text: data.item(i).text })
    }
    onProgress?.(++done, data.length)
  }
  if (lines.length === 0) {
    const received = `none: all ${data.bad.length} were left out`
    throw new PyraflowError('ERR_IO', {
      what: 'data set',
      expected: 'at least one clip that can be used',
      received,
    })
  }
  for (const filling of fillings) await filling.close(signal)

  const used = fillings.flatMap((filling, b) => (filling.files.length > 0 ? [{ filling, b }] : []))
  const shards = used.flatMap(({ filling }, bucket) => filling.files.map((file) => ({ file, bucket })))
  const index: LatentIndex = {
    format: LATENTS,
    entries: lines.length,
    normalisation: normalisationOf(store, lines),
    buckets: used.map(({ b }) => latentShape(vae, data.buckets[b] as Bucket)),
    shards,
  }
  await writeIndex(out, index, lines, signal)
  await store.sweep(new Set(shards.map(({ file }) => file)))
  const bytes = [...new Set(lines.map(({ key }) => key))].reduce((n, key) => n + store.rowBytes(key), 0)
  return { clips: lines.length, encoded, reused, bytes, bad: [...data.bad], stale: stale ?? null }
}

interface Fetched {
  readonly i: number
  readonly key: string
  /** Frames, unless the latents are known. */
  readonly clip: Uint8Array | undefined
}

async function settingsOf(
  vae: CausalVideoVAE,
  data: Dataset,
  pieces: VaePieces,
  signal: AbortSignal | undefined,
): Promise<Settings[]> {
  const identity = await encoderHash(vae, signal)
  return data.buckets.map(({ width, height, frames }) => ({
    vae: identity,
    dtype: vae.dtype,
    ...{ width, height, frames, fps: data.fps ?? null, short: data.short },
    decoder: data.backend.name,
    ...vae.planEncode([1, 3, frames, height, width], pieces),
  }))
}

function keyOf(content: string, settings: Settings): string {
  const text = JSON.stringify([LATENTS, content, settings])
  return createHash('sha256').update(text).digest('hex').slice(0, 32)
}

function rowsOf(
  keys: readonly string[],
  { shape, mean, logvar }: Pick<EncodedClip, 'shape' | 'mean' | 'logvar'>,
  moments: readonly EncodedClip['moments'][],
  settings: RowFacts,
): Rows {
  const dims = [keys.length, ...shape]
  const tensors = Object.entries({ mean, logvar }).map(
    ([name, data]) => ({ name, dtype: 'BF16', shape: dims, data }) as const,
  )
  return { keys, tensors, facts: moments.map(({ image, video }) => ({ image, video })), settings }
}

/**
 * Writes latents that were made elsewhere as a cache of one bucket.
 *
 * @param latents - `shape` [C, T, H, W]; `mean` and `logvar` bf16 bits [captions.length, …shape]
 * @throws ERR_IO; ERR_CHECKPOINT for data that does not fit the shape
 */
export async function writeLatents(
  out: string,
  latents: Pick<EncodedClip, 'shape' | 'mean' | 'logvar'> & {
    captions: readonly string[]
    normalisation: LatentNormalisation
  },
): Promise<void> {
  const { shape, captions, normalisation } = latents
  const store = await ShardFolder.open(join(out, SHARDS), LATENTS)
  const content = createHash('sha256')
  for (const bits of [latents.mean, latents.logvar]) content.update(bits)
  const made = content.digest('hex')
  const keys = captions.map((_, i) => `${made.slice(0, 24)}-${i}`)
  const none: EncodedClip['moments'] = { image: [0, 0, 0], video: [0, 0, 0] }
  const file = await store.write(
    rowsOf(
      keys,
      latents,
      keys.map(() => none),
      { given: true },
    ),
  )
  const lines = captions.map((text, i) => ({ key: keys[i] as string, clip: String(i), text }))
  const shards = [{ file, bucket: 0 }]
  const index = { format: LATENTS, entries: lines.length, normalisation, buckets: [shape], shards }
  await writeIndex(out, index satisfies LatentIndex, lines)
  await store.sweep(new Set([file]))
}

/** @throws ERR_OPTION */
function checkBucket(vae: CausalVideoVAE, bucket: Bucket): void {
  const [f, t] = [vae.spatialFactor, vae.temporalFactor]
  const { width, height, frames } = bucket
  if (width % f === 0 && height % f === 0 && (frames - 1) % t === 0) return
  throw new PyraflowError('ERR_OPTION', {
    what: 'size of the data set',
    expected: `multiples of ${f} pixels, and 1 + a multiple of ${t} frames, for this VAE`,
    received: bucketName(bucket),
  })
}

const SIZE = ['width', 'height', 'frames']

function findStale(store: ShardFolder, settings: readonly Settings[]): StaleLatents | undefined {
  const because = new Set<string>()
  let clips = 0
  for (const { settings: old, rows } of store.settings()) {
    const now = settings.find((s) => SIZE.every((name) => s[name] === old[name])) ?? (settings[0] as Settings)
    const differing = Object.keys(now).filter((name) => now[name] !== old[name])
    if (differing.length === 0) continue
    for (const name of differing) because.add(SIZE.includes(name) ? 'size' : name)
    clips += rows
  }
  return clips === 0 ? undefined : { clips, because: [...because].sort() }
}

/** What is said of latents that do not fit. */
export function describeStale({ clips, because }: StaleLatents): string {
  return `latents of ${clips} clips in the folder were made with another ${because.join(', another ')}; they are made anew`
}

function warnOfStale(stale: StaleLatents): void {
  emitWarning(describeStale(stale))
}

/** In the order of the data set and from numbers that lie in the shards: the same bits, however often it was interrupted. */
function normalisationOf(store: ShardFolder, lines: readonly LatentLine[]): LatentNormalisation {
  const total = { image: [0, 0, 0], video: [0, 0, 0] }
  for (const { key } of lines) {
    const facts = store.facts(key) as unknown as EncodedClip['moments']
    for (const part of ['image', 'video'] as const) {
      facts[part].forEach((value, i) => {
        total[part][i] = (total[part][i] as number) + value
      })
    }
  }
  const constants = ([n, sum, squares]: Moments): { shift: number; scale: number } => {
    const shift = sum / n
    return { shift, scale: 1 / Math.sqrt(Math.max(squares / n - shift * shift, 1e-12)) }
  }
  const image = total.image as unknown as Moments
  const video = total.video as unknown as Moments
  return { image: constants(image), video: constants(video[0] > 0 ? video : image) }
}
