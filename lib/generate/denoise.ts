import type { VelocityNetwork } from '../models/velocity-network.ts'
import type { Pipeline } from '../pipeline.ts'
import { type SampleEvent, sampleLatents, seededNoise } from '../sample.ts'
import type { Generator } from '../tensor/generator.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { Recipe } from './recipe.ts'
import type { PromptFeatures } from './texts.ts'
import { unitTokens } from './tokens.ts'

/** Latent frames of the whole video, those of what it continues included. */
export function latentsOf(pipeline: Pipeline, recipe: Recipe, given: Tensor | undefined): number {
  const f = pipeline.vae.temporalFactor
  const continued = recipe.continueFrom === undefined ? undefined : given?.shape[2]
  return continued === undefined ? (recipe.frames - 1) / f + 1 : continued + recipe.frames / f
}

/** The sampler as a recipe wants it. */
export function denoise(
  pipeline: Pipeline,
  work: {
    /** The pipeline's transformer, or one over its weights. */
    network: VelocityNetwork
    recipe: Recipe
    features: PromptFeatures
    generator: Generator
    /** Latent frames of the whole video, and those that are there. */
    frames: number
    given: Tensor | undefined
    signal: AbortSignal | undefined
  },
): AsyncGenerator<SampleEvent> {
  const { network, recipe, features, generator, frames, given, signal } = work
  const factor = pipeline.vae.spatialFactor
  const framesPerUnit = pipeline.config.framesPerUnit ?? 1
  return sampleLatents(network, {
    stages: pipeline.stages,
    frames,
    height: recipe.height / factor,
    width: recipe.width / factor,
    text: (unit) => features.of(promptAt(recipe, beginOf(unit, framesPerUnit, pipeline) / recipe.fps)),
    negative: features.negative(recipe.negativePrompt),
    steps: recipe.steps,
    videoSteps: recipe.videoSteps,
    guidance: {
      guidanceScale: recipe.guidanceScale,
      videoGuidanceScale: recipe.videoGuidanceScale,
      linear: recipe.linearGuidance,
      perUnit: recipe.guidance,
    },
    guidanceStop: recipe.guidanceStop,
    noise: seededNoise(generator),
    given,
    framesPerUnit,
    repeat: pipeline.maxMemory === undefined,
    historyCache: recipe.historyCache ?? 1,
    historyWindow: recipe.historyWindow,
    signal,
  })
}

/** The frame of the video with which a unit begins. */
function beginOf(unit: number, framesPerUnit: number, { vae }: Pipeline): number {
  return unit === 0 ? 0 : 1 + (unit - 1) * framesPerUnit * vae.temporalFactor
}

/** The prompt that a unit follows which begins at `seconds`. */
function promptAt({ prompt, promptChanges = [] }: Recipe, seconds: number): string {
  // Frame times are quotients, which may miss a whole second by a last digit.
  return promptChanges.filter(({ from }) => from <= seconds + 1e-6).at(-1)?.prompt ?? prompt
}

/**
 * What every step of a video of `frames` latent frames costs, of which the first `given` are there: in tokens, in the
 * order of the steps.
 */
export function stepCosts(
  pipeline: Pipeline,
  recipe: Recipe,
  part: { frames: number; given: number },
): number[] {
  const every = recipe.historyCache ?? 1
  return unitTokens(pipeline, recipe, part).flatMap(({ steps, kept, sequences, history, current, text }) =>
    Array.from(
      { length: steps },
      (_, n) => sequences * (kept > 0 && n % every !== 0 ? current : history + current + text),
    ),
  )
}
