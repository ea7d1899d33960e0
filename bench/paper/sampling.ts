import type { Prompt } from '../../examples/shapes/prompts.ts'
import { scoreClip } from '../../examples/shapes/scorer.ts'
import type { JumpCoefficients } from '../../lib/flow/jump.ts'
import { denormaliseLatents, normaliseLatents } from '../../lib/flow/normalise.ts'
import type { Stages } from '../../lib/flow/stages.ts'
import { cast } from '../../lib/ops/cast.ts'
import { concat, slice } from '../../lib/ops/copy.ts'
import { framesEncode } from '../../lib/ops/frames.ts'
import type { SampledNetwork } from '../../lib/sample/stage-run.ts'
import { type NoiseSource, sampleLatents, seededNoise } from '../../lib/sample.ts'
import { Generator } from '../../lib/tensor/generator.ts'
import { keep, scope } from '../../lib/tensor/scope.ts'
import { sliced } from '../../lib/tensor/sliced.ts'
import { noGrad } from '../../lib/tensor/tape.ts'
import type { Tensor } from '../../lib/tensor/tensor.ts'
import { disposeFeatures, type TextFeatures } from '../../lib/text/encoder.ts'
import type { LatentSource } from '../../lib/train/index.ts'
import { distance, frameOf, joinRows } from './metrics.ts'
import type { World } from './world.ts'

export interface Sampling {
  readonly stages: Stages
  /** Euler steps of every stage. */
  readonly steps: readonly number[]
  /** Latent frames. */
  readonly frames: number
  readonly fullSequence?: boolean
  readonly guidance?: number
  /** Other coefficients at the jumps than the matched ones. */
  readonly jump?: (matched: JumpCoefficients) => JumpCoefficients
}

const ROWS = 32

/** Normalised latents [N, 16, T, 16, 16] of these captions, a batch at a time; the caller owns them. */
export async function sample(
  world: World,
  model: SampledNetwork,
  captions: readonly string[],
  o: Sampling,
  seed: number,
  onStage?: (stage: number, began: Tensor, ended: Tensor) => Promise<void>,
): Promise<Tensor> {
  const parts: Tensor[] = []
  for (let at = 0; at < captions.length; at += ROWS) {
    const some = captions.slice(at, at + ROWS)
    const text = features(world, some)
    const negative = features(
      world,
      some.map(() => ''),
    )
    const scale = o.guidance ?? 2
    try {
      const noise: NoiseSource = seededNoise(new Generator(seed).stream('batch', at))
      const events = sampleLatents(model, {
        ...{ stages: o.stages, frames: o.frames, height: 16, width: 16, text, negative, noise },
        ...{ steps: o.steps, videoSteps: o.steps },
        ...(o.fullSequence && { fullSequence: true }),
        ...(o.jump && { jump: o.jump }),
        guidance: { guidanceScale: scale, videoGuidanceScale: scale },
      })
      const units: Tensor[] = []
      for await (const event of events) {
        if (event.type === 'unit') units.push(event.latent)
        else if (event.type === 'stage') await onStage?.(event.stage, event.began, event.latent)
      }
      parts.push(noGrad(() => keep(scope(() => concat(units, 2)))))
      for (const unit of units) unit.dispose()
    } finally {
      for (const f of [text, negative]) disposeFeatures(f)
    }
  }
  return joinRows(parts)
}

function features(world: World, captions: readonly string[]): TextFeatures {
  const made = scope(() => world.text.encode([...captions]))
  keep(made.embeds)
  keep(made.pooled)
  return made
}

/** Normalised latents of the first clips of a set, and their captions. */
function firstClips(set: LatentSource, count: number): { latents: Tensor; captions: string[] } {
  const indices = Array.from({ length: count }, (_, i) => i)
  const latents = noGrad(() =>
    keep(scope(() => normaliseLatents(set.gather(indices).mean, set.normalisation))),
  )
  return { latents, captions: indices.map((i) => set.captions[i] as string) }
}

/** Normalised latents of the first clips that nothing was trained on, and their captions. */
export const unseenLatents = (world: World, count: number): ReturnType<typeof firstClips> =>
  firstClips(world.unseen, count)

/** What real clips have as distance from other real clips: nothing can be better but by memory. */
export async function floorOf(world: World, count: number): Promise<{ videos: number; stills: number }> {
  const [a, b] = [firstClips(world.train, count).latents, unseenLatents(world, count).latents]
  const [p, q] = [frameOf(a, 0), frameOf(b, 0)]
  try {
    return { videos: await distance(a, b), stills: await distance(p, q) }
  } finally {
    for (const t of [a, b, p, q]) t.dispose()
  }
}

/** u8 RGB frames of clip `row`, [T, 128, 128, 3]. */
export async function framesOfRow(world: World, latents: Tensor, row: number): Promise<Uint8Array> {
  const steps = function* () {
    const z = denormaliseLatents(slice(latents, 0, row, 1), world.train.normalisation, true)
    return framesEncode(yield* world.vae.decodeSteps(cast(z, 'bf16')))
  }
  const bytes = await sliced(steps, { grad: false })
  try {
    return (await bytes.read()) as Uint8Array
  } finally {
    bytes.dispose()
  }
}

/** Makes the videos of prompts: the shares in which the scorer reads colour, shape and motion as asked for. */
export async function scoresOf(
  world: World,
  model: SampledNetwork,
  asked: readonly Prompt[],
  how: Sampling,
  seed: number,
): Promise<Record<'colour' | 'shape' | 'motion', number>> {
  const captions = asked.map(({ text }) => text)
  const latents = await sample(world, model, captions, how, seed)
  const right = { colour: 0, shape: 0, motion: 0 }
  for (const [row, { spec }] of asked.entries()) {
    const frames = await framesOfRow(world, latents, row)
    const count = frames.length / (128 * 128 * 3)
    const found = scoreClip(frames, { width: 128, height: 128, count })
    for (const name of ['colour', 'shape', 'motion'] as const) {
      right[name] += Number(found[name] === spec[name]) / asked.length
    }
  }
  latents.dispose()
  return right
}
