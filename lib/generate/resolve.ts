import { PyraflowError } from '../engine/errors.ts'
import type { ImageSource } from '../io/image.ts'
import { framesPerSecond, type SamplingPreset, samplingPresets } from '../models/presets.ts'
import { checkPieces } from '../models/vae-plan.ts'
import type { Pipeline } from '../pipeline.ts'
import { latentFrames, pixelFrames } from '../pyramid/units.ts'
import { adaptersOf } from './adapters.ts'
import { checkTypes } from './check-options.ts'
import type { ContinueSource, GenerateOptions, PromptChange } from './options.ts'
import type { Recipe } from './recipe.ts'

/** One video to be made: what can be written down, and what has to be given. */
export interface Request {
  readonly recipe: Recipe
  readonly image: ImageSource | undefined
  readonly continueFrom: ContinueSource | undefined
  readonly guidance: GenerateOptions['guidance']
  /** Where a recipe said it was made, if a recipe was given. */
  readonly made: { readonly [name in 'model' | 'backend' | 'dtype' | 'quantize']?: unknown }
}

/** A result is one array of bytes. */
const MAX_BYTES = 2 ** 32 - 1

/**
 * Fills in a pipeline's defaults and checks an option set, prompt by prompt and video by video; nothing is computed.
 * @throws ERR_OPTION
 */
export function resolveOptions(pipeline: Pipeline, options: GenerateOptions): Request[] {
  checkTypes(options)
  const parent = parentOf(options.continueFrom)
  const prompts = promptsOf(options, parent)
  const { videosPerPrompt = 1, image, continueFrom, guidance } = options
  const recipe = resolveOne(pipeline, options, parent)
  const made = options as Request['made']
  return prompts.flatMap((prompt) =>
    Array.from({ length: videosPerPrompt }, (_, i) => ({
      recipe: { ...recipe, prompt, seed: recipe.seed + i },
      image,
      continueFrom,
      guidance,
      made,
    })),
  )
}

/** The recipe that a continued video brings along; it gives the defaults. */
function parentOf(source: ContinueSource | undefined): Recipe | undefined {
  if (typeof source !== 'object') return undefined
  if ('recipe' in source) return source.recipe
  return 'prompt' in source ? source : undefined
}

function promptsOf({ prompt }: GenerateOptions, parent: Recipe | undefined): string[] {
  const given = prompt ?? parent?.prompt
  const prompts = typeof given === 'string' ? [given] : [...(given ?? [])]
  if (prompts.length > 0) return prompts
  throw wrong('prompt', 'a string or a list of them', given === undefined ? 'nothing' : 'an empty list')
}

function resolveOne(pipeline: Pipeline, options: GenerateOptions, parent: Recipe | undefined): Recipe {
  const { config: c, vae, stages, dtype, quantize } = pipeline
  const { continueFrom, image } = options
  if (continueFrom !== undefined && image !== undefined) {
    throw wrong('image', 'none when a video is continued', 'both', 'Give either image or continueFrom.')
  }
  const fps = c.fps ?? framesPerSecond
  const latents = latentCount(options, { fps, framesPerUnit: c.framesPerUnit ?? 1, seconds: c.seconds ?? 5 })
  const frames = pixelFrames(latents) - (continueFrom === undefined ? 0 : 1)
  const preset = presetFor(options, latents)
  const [width, height] = c.sizes?.[0] ?? [640, 384]
  const perStage = (name: 'steps' | 'videoSteps'): number[] => {
    const list = options[name] ?? parent?.[name] ?? c[name] ?? preset[name]
    return stepList(name, list, stages.count, stages.trainTimesteps)
  }
  const adapters = adaptersOf(pipeline, options, parent)
  const { prompt, promptChanges = prompt === undefined ? parent?.promptChanges : undefined } = options
  const recipe: Recipe = {
    prompt: '',
    ...(promptChanges?.length ? { promptChanges: sortedChanges(promptChanges) } : {}),
    negativePrompt: options.negativePrompt ?? parent?.negativePrompt ?? negativeOf(pipeline),
    width: options.width ?? sizeOfSource(continueFrom, vae.spatialFactor)?.width ?? width,
    height: options.height ?? sizeOfSource(continueFrom, vae.spatialFactor)?.height ?? height,
    frames,
    fps,
    seed: options.seed ?? parent?.seed ?? 0,
    steps: perStage('steps'),
    videoSteps: perStage('videoSteps'),
    guidanceScale: options.guidanceScale ?? parent?.guidanceScale ?? c.guidanceScale ?? preset.guidance,
    videoGuidanceScale:
      options.videoGuidanceScale ??
      parent?.videoGuidanceScale ??
      c.videoGuidanceScale ??
      preset.videoGuidance,
    dtype,
    ...(quantize && { quantize }),
    ...guidanceOf(options, parent),
    ...stopOf(options.guidanceStop ?? parent?.guidanceStop),
    ...historyOf(pipeline, {
      historyCache: options.historyCache ?? parent?.historyCache,
      historyWindow: options.historyWindow ?? parent?.historyWindow,
    }),
    ...(typeof image === 'string' ? { image } : {}),
    ...(typeof continueFrom === 'string' ? { continueFrom } : parent ? { continueFrom: parent } : {}),
    ...(adapters.length > 0 ? { adapters } : {}),
    ...((options.allowUntrained ?? parent?.allowUntrained) ? { allowUntrained: true as const } : {}),
    ...(options.maxMemory === undefined ? {} : { maxMemory: options.maxMemory }),
  }
  checkPieces({ maxMemory: options.maxMemory }, vae.spatialFactor)
  checkSize(pipeline, recipe)
  checkLength(recipe, frames)
  return recipe
}

function negativeOf({ config, text }: Pipeline): string {
  return config.negativePrompt ?? text.negativePrompt ?? ''
}

/** Latent frames to make; one more when continuing, to be counted like a video that begins with its last frame. */
function latentCount(
  options: GenerateOptions,
  model: { fps: number; framesPerUnit: number; seconds: number },
): number {
  const { fps, framesPerUnit } = model
  const { frames, seconds = model.seconds, continueFrom, image } = options
  if (frames !== undefined && options.seconds !== undefined) {
    throw wrong('length', 'seconds or frames', 'both')
  }
  const count = frames !== undefined && continueFrom !== undefined ? frames + 1 : frames
  const length = count === undefined ? { seconds } : { frames: count }
  const latents = latentFrames({ ...length, fps, framesPerUnit })
  if (latents > 1 || (image === undefined && continueFrom === undefined)) return latents
  // Rounding must not turn a wish for more into nothing.
  if (continueFrom !== undefined) return 1 + framesPerUnit
  throw wrong('length', 'more than the given first frame', '1 frame', 'Ask for more seconds or frames.')
}

function presetFor({ image, continueFrom }: GenerateOptions, latents: number): SamplingPreset {
  if (image !== undefined) return samplingPresets.imageToVideo
  return latents === 1 && continueFrom === undefined ? samplingPresets.image : samplingPresets.textToVideo
}

function guidanceOf(
  { guidance, linearGuidance, guidanceScale, videoGuidanceScale }: GenerateOptions,
  parent: Recipe | undefined,
): Pick<Recipe, 'guidance' | 'linearGuidance'> {
  if (guidance !== undefined && linearGuidance !== undefined) {
    throw wrong('guidance', 'guidance or linearGuidance', 'both')
  }
  if (Array.isArray(guidance)) return { guidance: [...guidance] }
  if (guidance !== undefined) return {}
  if (linearGuidance)
    return { linearGuidance: { alpha: linearGuidance.alpha ?? 0.5, min: linearGuidance.min ?? 2 } }
  // Scales that are given now replace the schedule of the video that is continued.
  if (guidanceScale !== undefined || videoGuidanceScale !== undefined) return {}
  return {
    ...(parent?.guidance ? { guidance: parent.guidance } : {}),
    ...(parent?.linearGuidance ? { linearGuidance: parent.linearGuidance } : {}),
  }
}

const stopOf = (guidanceStop = 1): Pick<Recipe, 'guidanceStop'> =>
  guidanceStop === 1 ? {} : { guidanceStop }

function historyOf(
  { transformer }: Pipeline,
  { historyCache = 1, historyWindow }: Pick<GenerateOptions, 'historyCache' | 'historyWindow'>,
): Pick<Recipe, 'historyCache' | 'historyWindow'> {
  const window = historyWindow === undefined ? {} : { historyWindow }
  if (historyCache === 1) return window
  if (transformer.config.use_temporal_causal) return { historyCache, ...window }
  throw wrong(
    'historyCache',
    '1 with this model, whose history sees the frames that are being made',
    `${historyCache}`,
  )
}

function sizeOfSource(
  source: ContinueSource | undefined,
  factor: number,
): { width: number; height: number } | undefined {
  if (typeof source !== 'object') return undefined
  if ('width' in source) return 'prompt' in source || 'recipe' in source ? source : undefined
  const [, , , h, w] = source.shape
  return { width: w * factor, height: h * factor }
}

function stepList(name: string, value: number | readonly number[], stages: number, most: number): number[] {
  const list = typeof value === 'number' ? new Array<number>(stages).fill(value) : [...value]
  if (list.length === stages && list.every((n) => Number.isInteger(n) && n > 0 && n <= most)) return list
  throw wrong(name, `${stages} whole numbers from 1 to ${most}, one a stage`, `[${list}]`)
}

const sortedChanges = (changes: readonly PromptChange[]): PromptChange[] =>
  changes.map(({ from, prompt }) => ({ from, prompt })).sort((a, b) => a.from - b.from)

function checkSize({ config, stages, vae, transformer }: Pipeline, recipe: Recipe): void {
  const { width, height, allowUntrained } = recipe
  const received = `${width}×${height}`
  const trained = config.sizes
  if (trained && !allowUntrained && !trained.some(([w, h]) => w === width && h === height)) {
    throw wrong(
      'size',
      trained.map(([w, h]) => `${w}×${h}`).join(' or '),
      received,
      'Pass allowUntrained: true to try it all the same.',
    )
  }
  const unit = vae.spatialFactor * 2 ** stages.count
  if (width % unit !== 0 || height % unit !== 0) {
    const near = (n: number): number => Math.max(unit, Math.round(n / unit) * unit)
    const remedy = `The nearest size that works is ${near(width)}×${near(height)}.`
    throw wrong('size', `width and height that are multiples of ${unit}`, received, remedy)
  }
  // Patches are two latent cells wide.
  const table = (transformer.config as { pos_embed_max_size?: number }).pos_embed_max_size
  const most = (table ?? Number.POSITIVE_INFINITY) * 2 * vae.spatialFactor
  if (Math.max(width, height) > most) {
    throw wrong('size', `at most ${most} pixels a side, which the position table holds`, received)
  }
}

/** @throws ERR_OPTION when so many frames do not fit in one array. */
export function checkLength({ width, height, fps }: Recipe, frames: number): void {
  const most = Math.floor(MAX_BYTES / (width * height * 3))
  if (frames <= most) return
  throw wrong(
    'video length',
    `at most ${most} frames (${Math.floor(most / fps)} s) of ${width}×${height}`,
    `${frames} frames`,
    'Make it in parts with continueFrom.',
  )
}

export function wrong(what: string, expected: string, received: string, remedy?: string): PyraflowError {
  return new PyraflowError('ERR_OPTION', { what, expected, received, remedy })
}
