import type { Tensor } from '../tensor/tensor.ts'

/** Prompt features of R rows, as every text encoder of the package gives them. */
export interface TextFeatures {
  /** [R, S, joint dim]. */
  embeds: Tensor
  /** R × S, 1 for a token, 0 for padding. */
  mask: number[][]
  /** [R, pooled dim]. */
  pooled: Tensor
}

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
