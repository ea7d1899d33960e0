import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { denormaliseLatents } from '../flow/normalise.ts'
import { ioError } from '../io/atomic.ts'
import { type ContactClip, contactSheet } from '../io/contact-sheet.ts'
import { CausalVideoVAE } from '../models/causal-vae.ts'
import { cast } from '../ops/cast.ts'
import { framesEncode } from '../ops/frames.ts'
import type { SampledNetwork } from '../sample/stage-run.ts'
import { type SampleOptions, sampleLatents, seededNoise } from '../sample.ts'
import { Generator } from '../tensor/generator.ts'
import { keep, scope } from '../tensor/scope.ts'
import { sliced } from '../tensor/sliced.ts'
import { disposeFeatures, type TextFeatures } from '../text/encoder.ts'
import type { Objective } from './objective.ts'

/** Videos to make while training, always of the same prompts and noise. */
export interface SampleGridOptions {
  prompts: readonly string[]
  /** Steps between grids. */
  every?: number
  /** Decodes them: a VAE, or the folder of one that is loaded for each grid and freed again. */
  vae: CausalVideoVAE | string
  /** Prompt i gets the noise of seed + i. Default 0. */
  seed?: number
  /** Latent frames, height and width; default those of the longest clips of the data set. */
  size?: readonly [number, number, number]
  /** Euler steps a stage, of the first unit and of later ones; default 10 and 8. */
  steps?: number
  videoSteps?: number
  /** Default 7 and 5; 0 turns guidance off. */
  guidanceScale?: number
  videoGuidanceScale?: number
  /** Frames shown of each video, 6. */
  shownFrames?: number
}

/**
 * Makes the videos with the sampler that pipelines have and writes them as one contact sheet; everything it needs is
 * freed again.
 *
 * @throws ERR_IO, ERR_NUMERICS naming unit, stage and layer, and what loading the VAE throws
 */
export async function sampleGrid(
  objective: Objective,
  options: SampleGridOptions & { size: readonly [number, number, number] },
  path: string,
  signal?: AbortSignal,
): Promise<void> {
  const { prompts, seed = 0, vae: given } = options
  if (prompts.length === 0) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'samples.prompts',
      expected: 'at least one prompt',
      received: 'none',
    })
  }
  const vae =
    typeof given === 'string'
      ? await CausalVideoVAE.fromPretrained(given, { dtype: objective.model.dtype, signal })
      : given
  const features = (prompt: string): TextFeatures => {
    const made = scope(() => objective.text.encode([prompt]))
    keep(made.embeds)
    keep(made.pooled)
    return made
  }
  const negative = features('')
  try {
    const clips: ContactClip[] = []
    for (const [i, prompt] of prompts.entries()) {
      const text = features(prompt)
      try {
        const noise = seededNoise(new Generator(seed + i))
        const frames = await sampleFrames(objective, vae, { ...options, text, negative, noise, signal })
        clips.push({ ...frames, label: prompt })
      } finally {
        disposeFeatures(text)
      }
    }
    await contactSheet(path, clips, { framesPerClip: options.shownFrames ?? 6 })
  } finally {
    disposeFeatures(negative)
    if (typeof given === 'string') vae.dispose()
  }
}

type Sampled = Pick<SampleOptions, 'noise' | 'signal' | 'negative'> & { text: TextFeatures }

async function sampleFrames(
  objective: Objective,
  vae: CausalVideoVAE,
  o: SampleGridOptions & Sampled & { size: readonly [number, number, number] },
): Promise<{ frames: Uint8Array; width: number; height: number }> {
  const { model, stages, framesPerUnit, temporalPyramid, normalisation } = objective
  const [latentFrames, height, width] = o.size
  const { steps = 10, videoSteps = 8, guidanceScale = 7, videoGuidanceScale = 5 } = o
  const each = (n: number): number[] => new Array<number>(stages.count).fill(n)
  const units = sampleLatents(asTrained(model, objective.causal), {
    ...{ stages, framesPerUnit, height, width, frames: latentFrames, fullSequence: !temporalPyramid },
    ...{ steps: each(steps), videoSteps: each(videoSteps), guidance: { guidanceScale, videoGuidanceScale } },
    ...{ text: o.text, negative: o.negative, noise: o.noise, signal: o.signal },
  })
  const stream = vae.decodeStream()
  const parts: Uint8Array[] = []
  try {
    for await (const event of units) {
      if (event.type !== 'unit') continue
      const { latent, unit } = event
      try {
        const decode = function* () {
          const z = cast(denormaliseLatents(latent, normalisation, unit === 0), vae.dtype)
          return framesEncode(yield* stream.pushSteps(z))
        }
        const bytes = await sliced(decode, { grad: false })
        parts.push((await bytes.read()) as Uint8Array)
        bytes.dispose()
      } finally {
        latent.dispose()
      }
    }
  } finally {
    stream.dispose()
  }
  const factor = vae.spatialFactor
  return { frames: Buffer.concat(parts), width: width * factor, height: height * factor }
}

// The sampler asks for layouts without saying whether frames see later ones: as the network was trained.
export function asTrained(model: SampledNetwork, causal: boolean | undefined): SampledNetwork {
  return {
    latentChannels: model.latentChannels,
    ...(model.offload && { offload: model.offload }),
    ...(model.timeFeatures && { timeFeatures: model.timeFeatures.bind(model) }),
    layoutSteps: (inputs) => model.layoutSteps({ ...inputs, causal }),
    forwardSteps: (inputs) => model.forwardSteps({ ...inputs, causal }),
  }
}

/** Where the grid of a step goes. @throws ERR_IO */
export async function gridPath(dir: string, step: number): Promise<string> {
  await mkdir(dir, { recursive: true }).catch((error: unknown) => {
    throw ioError(error, 'make folder of samples', dir)
  })
  return join(dir, `step-${String(step).padStart(6, '0')}.png`)
}
