import type { ImageSource } from '../io/image.ts'
import type { AdapterChoice } from '../lora/blend.ts'
import type { LatentClip } from './latents.ts'
import type { Recipe } from './recipe.ts'
import type { Video } from './video.ts'

/** Frames as they are: u8 RGB [T, height, width, 3]. */
export interface RawClip {
  frames: Uint8Array
  width: number
  height: number
}

/**
 * What a generation continues: a finished video or its saved latents (nothing is lost), the recipe of one (which is
 * made again first), or a clip whose frames are encoded: a path to a video file or frames in memory.
 */
export type ContinueSource = Video | LatentClip | Recipe | RawClip | string

/** Another prompt from `from` seconds on, counted from the beginning of the video. */
export interface PromptChange {
  from: number
  prompt: string
}

/** What to generate. A {@link Recipe} is one, too. Defaults come from the model folder. */
export interface GenerateOptions {
  /** One prompt, or several for a batch. May be empty. Required unless the continued video brings its own. */
  prompt?: string | readonly string[] | undefined
  /** Later prompts; each holds from the first unit that begins at or after `from`. */
  promptChanges?: readonly PromptChange[] | undefined
  negativePrompt?: string | undefined
  /** Videos of each prompt; number i is what `seed: seed + i` gives alone, bit for bit. Default 1. */
  videosPerPrompt?: number | undefined
  /** Pixels; multiples of 8·2^stages, one of the model's sizes unless `allowUntrained`. */
  width?: number | undefined
  height?: number | undefined
  /**
   * Length in seconds, rounded to whole units, or at least so many frames; 1 frame is an image. When continuing: how
   * much longer.
   */
  seconds?: number | undefined
  frames?: number | undefined
  /** A first frame to continue from, scaled to cover the size and cropped. */
  image?: ImageSource | undefined
  continueFrom?: ContinueSource | undefined
  /** A whole number from 0. Default 0. */
  seed?: number | undefined
  /** Euler steps of the first unit: one number a stage, or one for all. */
  steps?: number | readonly number[] | undefined
  /** The same of later units. */
  videoSteps?: number | readonly number[] | undefined
  /** How strongly the first unit follows the prompt (27); 0 turns guidance off. */
  guidanceScale?: number | undefined
  /** The same of later units. */
  videoGuidanceScale?: number | undefined
  /** Guidance unit by unit, in place of both scales: values of which the last holds on, or a function of the unit. */
  guidance?: readonly number[] | ((unit: number) => number) | undefined
  /** Guidance that falls from `guidanceScale` by `alpha` a unit down to `min` (0.5 and 2), in place of both scales. */
  linearGuidance?: { alpha?: number | undefined; min?: number | undefined } | undefined
  /**
   * The share of a unit's steps, 0 to 1, after which guidance ends: steps without it take half the time. 2/3 with as many
   * steps in each of three stages leaves the last stage unguided. Default 1, as the models were sampled.
   */
  guidanceStop?: number | undefined
  /**
   * Every how many steps of a stage text and earlier frames go through the network. In between a unit sees their keys and
   * values as they were at an earlier step, which makes later units two to three times as fast and is not quite the same
   * (docs/generating.md). Default 1: at every step.
   */
  historyCache?: number | undefined
  /**
   * Units of the past that a unit sees at most, beside the first frame. Every second of a long video then takes the same time,
   * and positions stay within those of a video of so many units. Default: all, as the models were trained.
   */
  historyWindow?: number | undefined
  /** Low-rank adapters to add to the transformer for this generation, in place of the pipeline's; [] for none. */
  adapters?: readonly AdapterChoice[] | undefined
  /**
   * Folder in which the latents of finished units are kept: the same call after a crash, an abort or a failed decoding goes
   * on behind the last of them, to the same bits. Units of another video in it are an error.
   */
  resume?: string | undefined
  /** Show a small picture at the end of every stage but the last. Costs a few per cent of decoding. */
  previews?: boolean | undefined
  /** Accept sizes that the model was not trained for. */
  allowUntrained?: boolean | undefined
  /** Bytes that decoding may take besides the weights. Frames are the whole clip's by default. */
  maxMemory?: number | undefined
  /** Ends the generation at once, wherever it is, with ERR_ABORTED. */
  signal?: AbortSignal | undefined
}
