import type { Stages } from '../flow/stages.ts'
import { axpby } from '../ops/pointwise.ts'
import type { Pipeline } from '../pipeline.ts'
import type { SampleEvent } from '../sample.ts'
import { keep, scope } from '../tensor/scope.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { decodeFrames, type Work } from './latents.ts'

type StageEvent = Extract<SampleEvent, { type: 'stage' }>

/**
 * What a unit will look like, from the end of a stage: u8 RGB [1 + 8(f − 1), h, w, 3] at the stage's resolution. The latent is
 * still noisy there; as the flow between S = a·n + (1 − a)·x and E = b·n + (1 − b)·x is straight, the clean one is
 * E − b/(a − b)·(S − E), of (14) to (17) with x taken for its own upsampled half.
 */
export async function preview(
  pipeline: Pipeline,
  { stage, began, latent }: StageEvent,
  where: Work & { what: string; begins: boolean },
): Promise<{ frames: Uint8Array; width: number; height: number; count: number }> {
  const { vae, stages } = pipeline
  const clean = keep(scope(() => cleanEstimate(stages, stage, began, latent)))
  try {
    // As if a clip began here: what the decoder carries on from earlier units is of another resolution.
    const frames = await decodeFrames(pipeline, clean, { ...where, decode: (z) => vae.decodeSteps(z) })
    const factor = vae.spatialFactor
    const height = (latent.shape[3] as number) * factor
    const width = (latent.shape[4] as number) * factor
    return { frames, width, height, count: frames.length / (width * height * 3) }
  } finally {
    clean.dispose()
  }
}

function cleanEstimate(stages: Stages, stage: number, began: Tensor, ended: Tensor): Tensor {
  const [a, b] = [stages.start[stage] as number, stages.end[stage] as number]
  const share = b / (a - b)
  return axpby(ended, began, 1 + share, -share)
}
