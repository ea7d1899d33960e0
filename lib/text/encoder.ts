import type { TextFeatures } from '../sample.ts'

/** What the pipeline and the trainer need of a text encoder, whatever its kind. */
export interface TextEncoder {
  /** Width of `embeds`. */
  readonly jointDim: number
  /** Width of `pooled`. */
  readonly pooledDim: number
  /** Tokens a row. */
  readonly maxLength: number
  /** Features of R prompts; '' is the null condition. The caller disposes them. */
  encode(prompts: readonly string[]): TextFeatures
}
