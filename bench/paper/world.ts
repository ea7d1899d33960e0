import { existsSync } from 'node:fs'
import { readFile, rename } from 'node:fs/promises'
import { join } from 'node:path'
import { caption, FRAMES, makeRng, randomSpec, renderClip, SIZE } from '../../examples/shapes/world.ts'
import { engine } from '../../lib/engine/engine.ts'
import type { LatentNormalisation } from '../../lib/flow/normalise.ts'
import { CausalVideoVAE } from '../../lib/models/causal-vae.ts'
import { cast } from '../../lib/ops/cast.ts'
import { framesDecode } from '../../lib/ops/frames.ts'
import { sliced } from '../../lib/tensor/sliced.ts'
import { Tensor } from '../../lib/tensor/tensor.ts'
import { LatentDataset, writeLatents } from '../../lib/train/index.ts'
import { wordEncoder } from '../toy.ts'

export const MODEL = 'examples/shapes/model'

/** Latents of the toy world: clips to train on, and others that generated ones are compared with. */
export interface World {
  readonly train: LatentDataset
  readonly unseen: LatentDataset
  readonly vae: CausalVideoVAE
  readonly text: ReturnType<typeof wordEncoder>
  dispose(): void
}

/** Draws and encodes the clips the first time; `counts` are those of a quick run or of a real one. */
export async function openWorld(
  dir: string,
  counts: { train: number; unseen: number },
  say: (line: string) => void,
): Promise<World> {
  const vae = await CausalVideoVAE.fromPretrained(join(MODEL, 'causal_video_vae'), { dtype: 'bf16' })
  const settings = await readFile(join(MODEL, 'pyraflow.json'), 'utf8')
  const { normalisation } = JSON.parse(settings) as { normalisation: LatentNormalisation }
  const open = async (name: 'train' | 'unseen', seed: number): Promise<LatentDataset> => {
    const folder = join(dir, `${name}-${counts[name]}`)
    if (!existsSync(folder)) {
      say(`encoding ${counts[name]} clips: ${folder}`)
      await encodeWorld(vae, `${folder}.partial`, { count: counts[name], seed, normalisation })
      await rename(`${folder}.partial`, folder)
    }
    return await LatentDataset.open(folder)
  }
  const train = await open('train', 11)
  const unseen = await open('unseen', 12)
  return {
    ...{ train, unseen, vae, text: wordEncoder() },
    dispose: () => {
      for (const x of [train, unseen, vae]) x.dispose()
    },
  }
}

async function encodeWorld(
  vae: CausalVideoVAE,
  out: string,
  o: { count: number; seed: number; normalisation: LatentNormalisation },
): Promise<void> {
  const captions: string[] = []
  const parts: Record<'mean' | 'logvar', Uint16Array[]> = { mean: [], logvar: [] }
  let shape: number[] = []
  for (let i = 0; i < o.count; i++) {
    const spec = randomSpec(makeRng(o.seed * 1_000_003 + i), 'train')
    const frames = renderClip(spec)
    const posterior = await sliced(
      function* () {
        const x = framesDecode(Tensor.from(frames, [1, FRAMES, SIZE, SIZE, 3]))
        const p = yield* vae.encodeSteps(cast(x, 'bf16'))
        return { mean: cast(p.mean, 'bf16'), logvar: cast(p.logvar, 'bf16') }
      },
      { grad: false },
    )
    shape = posterior.mean.shape.slice(1)
    for (const name of ['mean', 'logvar'] as const) {
      const t = posterior[name]
      const bits = new Uint16Array(t.size)
      await engine.read(t.storage, t.byteOffset, bits)
      t.dispose()
      parts[name].push(bits)
    }
    captions.push(caption(spec))
  }
  const joined = (list: Uint16Array[]): Uint16Array => {
    const all = new Uint16Array(list.reduce((n, x) => n + x.length, 0))
    let at = 0
    for (const x of list) {
      all.set(x, at)
      at += x.length
    }
    return all
  }
  await writeLatents(out, {
    ...{ shape, captions, normalisation: o.normalisation },
    ...{ mean: joined(parts.mean), logvar: joined(parts.logvar) },
  })
}
