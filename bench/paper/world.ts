import { existsSync } from 'node:fs'
import { readFile, rename } from 'node:fs/promises'
import { join } from 'node:path'
import { makePrompts, type Prompt } from '../../examples/shapes/prompts.ts'
import { caption, FRAMES, makeRng, randomSpec, renderClip, SIZE } from '../../examples/shapes/world.ts'
import type { LatentNormalisation } from '../../lib/flow/normalise.ts'
import { CausalVideoVAE } from '../../lib/models/causal-vae.ts'
import { encodeClip, latentShape } from '../../lib/train/encode-clip.ts'
import { CachedTextEncoder, encodeTexts, LatentDataset, writeLatents } from '../../lib/train/index.ts'

export const MODEL = 'examples/shapes/model'

/** Latents of the toy world: clips to train on, and others that generated ones are compared with. */
export interface World {
  readonly train: LatentDataset
  readonly unseen: LatentDataset
  readonly vae: CausalVideoVAE
  readonly text: CachedTextEncoder
  dispose(): void
}

/** What videos are asked for whose scores are counted; some of it was never trained on. */
export const prompts = (count: number): Prompt[] => makePrompts(count, 900)

/** Draws and encodes the clips the first time; `counts` are those of a quick run or of a real one. */
export async function openWorld(
  dir: string,
  counts: { train: number; unseen: number; scored: number },
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
  const texts = join(dir, 'text')
  const asked = prompts(counts.scored).map(({ text }) => text)
  await encodeTexts(MODEL, [...train.captions, ...unseen.captions, ...asked], texts)
  const text = await CachedTextEncoder.open(texts)
  return {
    ...{ train, unseen, vae, text },
    dispose: () => {
      for (const x of [train, unseen, vae, text]) x.dispose()
    },
  }
}

async function encodeWorld(
  vae: CausalVideoVAE,
  out: string,
  o: { count: number; seed: number; normalisation: LatentNormalisation },
): Promise<void> {
  const bucket = { width: SIZE, height: SIZE, frames: FRAMES }
  const shape = latentShape(vae, bucket)
  const size = shape.reduce((a, b) => a * b, 1)
  const [mean, logvar] = [new Uint16Array(o.count * size), new Uint16Array(o.count * size)]
  const captions: string[] = []
  for (let i = 0; i < o.count; i++) {
    const spec = randomSpec(makeRng(o.seed * 1_000_003 + i), 'train')
    const encoded = await encodeClip(vae, renderClip(spec), bucket)
    mean.set(encoded.mean, i * size)
    logvar.set(encoded.logvar, i * size)
    captions.push(caption(spec))
  }
  await writeLatents(out, { shape, captions, normalisation: o.normalisation, mean, logvar })
}
