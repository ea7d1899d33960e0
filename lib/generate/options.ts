import { PyraflowError } from '../engine/errors.ts'
import { framesPerSecond, samplingPresets } from '../models/presets.ts'
import { checkPieces } from '../models/vae-plan.ts'
import type { Pipeline } from '../pipeline.ts'
import { latentFrames, pixelFrames } from '../pyramid/units.ts'

export interface GenerateOptions {
  prompt: string
  negativePrompt?: string
  /** Pixels; multiples of 8·2^stages, one of the model's sizes unless `allowUntrained`. */
  width?: number
  height?: number
  /** Length: seconds, or at least so many frames. */
  seconds?: number
  frames?: number
  /** A first frame to continue from: a path, decoded and cropped to the size. */
  image?: string
  seed?: number
  steps?: readonly number[]
  videoSteps?: readonly number[]
  guidanceScale?: number
  videoGuidanceScale?: number
  allowUntrained?: boolean
  /** Bytes that decoding may take besides the weights; see `VaePieces`. Frames are the whole clip's by default. */
  maxMemory?: number
  signal?: AbortSignal
}

/** What a result was made from; the same recipe gives the same video. */
export type Recipe = Required<
  Omit<GenerateOptions, 'signal' | 'image' | 'frames' | 'seconds' | 'allowUntrained' | 'maxMemory'>
> & {
  frames: number
  fps: number
  image?: string
  maxMemory?: number
  dtype: string
}

/** Fills in a pipeline's defaults and checks an option set; nothing is computed. @throws ERR_OPTION */
export function resolveOptions(pipeline: Pipeline, options: GenerateOptions): Recipe {
  const c = pipeline.config
  const preset = options.image === undefined ? samplingPresets.textToVideo : samplingPresets.imageToVideo
  const [width, height] = c.sizes?.[0] ?? [640, 384]
  const fps = c.fps ?? framesPerSecond
  const length =
    options.frames === undefined ? { seconds: options.seconds ?? c.seconds ?? 5 } : { frames: options.frames }
  const perStage = (name: string, list: readonly number[]): number[] => {
    if (list.length === pipeline.stages.count && list.every((n) => Number.isInteger(n) && n > 0))
      return [...list]
    throw new PyraflowError('ERR_OPTION', {
      what: name,
      expected: `${pipeline.stages.count} positive whole numbers, one a stage`,
      received: `[${list}]`,
    })
  }
  if (typeof options.prompt !== 'string') {
    throw new PyraflowError('ERR_OPTION', {
      what: 'prompt',
      expected: 'a string',
      received: typeof options.prompt,
    })
  }
  const recipe: Recipe = {
    prompt: options.prompt,
    negativePrompt: options.negativePrompt ?? pipeline.text.negativePrompt ?? '',
    width: options.width ?? width,
    height: options.height ?? height,
    frames: pixelFrames(latentFrames({ ...length, fps, framesPerUnit: c.framesPerUnit ?? 1 })),
    fps,
    seed: options.seed ?? 0,
    steps: perStage('steps', options.steps ?? c.steps ?? preset.steps),
    videoSteps: perStage('videoSteps', options.videoSteps ?? c.videoSteps ?? preset.videoSteps),
    guidanceScale: options.guidanceScale ?? c.guidanceScale ?? preset.guidance,
    videoGuidanceScale: options.videoGuidanceScale ?? c.videoGuidanceScale ?? preset.videoGuidance,
    dtype: pipeline.dtype,
    ...(options.image === undefined ? {} : { image: options.image }),
    ...(options.maxMemory === undefined ? {} : { maxMemory: options.maxMemory }),
  }
  checkPieces({ maxMemory: options.maxMemory }, pipeline.vae.spatialFactor)
  const trained = c.sizes
  if (
    trained &&
    !options.allowUntrained &&
    !trained.some(([w, h]) => w === recipe.width && h === recipe.height)
  ) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'size',
      expected: trained.map(([w, h]) => `${w}×${h}`).join(' or '),
      received: `${recipe.width}×${recipe.height}`,
      remedy: 'Pass allowUntrained: true to try it all the same.',
    })
  }
  return recipe
}
