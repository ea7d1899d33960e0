import { existsSync } from 'node:fs'
import { PyraflowError } from '../engine/errors.ts'
import { readEmbedded } from '../io/embedded.ts'
import { readJsonObject } from '../io/pretrained.ts'
import type { PromptChange } from './options.ts'

/**
 * What a video was made from, as plain JSON: `pipeline.generate(recipe)` makes it again, to the last bit on the same
 * model, compute type and backend.
 */
export interface Recipe {
  prompt: string
  promptChanges?: PromptChange[]
  negativePrompt: string
  width: number
  height: number
  /** Frames of the video, or those that were added to the one continued. */
  frames: number
  fps: number
  seed: number
  steps: number[]
  videoSteps: number[]
  guidanceScale: number
  videoGuidanceScale: number
  guidance?: number[]
  linearGuidance?: { alpha: number; min: number }
  guidanceStop?: number
  historyCache?: number
  historyWindow?: number
  /** Path of the first frame, or `sha256:…` of one that was given as bytes and has to be given again. */
  image?: string
  /** The recipe or path of what was continued, or `sha256:…` of latents or frames that have to be given again. */
  continueFrom?: Recipe | string
  /** Adapters that were added to the transformer; `hash` tells their files from others of the same name. */
  adapters?: { path: string; scale: number; hash?: string }[]
  allowUntrained?: true
  maxMemory?: number
  dtype: 'f32' | 'bf16'
  /** How products of the transformer's tokens were rounded, if they were. */
  quantize?: 'int8'
  /** Content hash of the model folder. */
  model?: string
  /** The kernels that computed it, e.g. `cpu_avx512`. */
  backend?: string
}

/** The recipe beside a saved video, or else the one inside it. @throws ERR_IO, ERR_CHECKPOINT when there is none. */
export async function readRecipe(path: string): Promise<Recipe> {
  const remedy = 'Give a video that pyraflow saved, or its .json file.'
  const beside = path.endsWith('.json') ? path : `${path}.json`
  if (path.endsWith('.json') || existsSync(beside)) {
    return readJsonObject(beside, { expected: 'the recipe of a video', remedy }) as unknown as Recipe
  }
  const text = await readEmbedded(path)
  try {
    const recipe = JSON.parse(text ?? '') as Recipe
    if (typeof recipe.prompt === 'string') return recipe
  } catch {}
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: path,
    expected: 'a video with its recipe inside or beside it',
    received: text === undefined ? 'no recipe' : 'something else',
    remedy,
  })
}
