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

export function disposeFeatures({ embeds, pooled }: TextFeatures): void {
  embeds.dispose()
  pooled.dispose()
}

/** How one call of a text encoder is run. */
export interface EncodeOptions {
  readonly signal?: AbortSignal | undefined
  /** Is told what of a prompt was cut. Default: `process.emitWarning`, or what the encoder was made with. */
  readonly onWarning?: ((message: string) => void) | undefined
}

/** Warns as Node programs do. */
export const emitWarning = (message: string): void => process.emitWarning(message, 'PyraflowWarning')

/** What the pipeline needs of a text encoder, whatever its kind. */
export interface TextEncoder {
  /** Width of `embeds`. */
  readonly jointDim: number
  /** Width of `pooled`. */
  readonly pooledDim: number
  /** Tokens a row. */
  readonly maxLength: number
  /** Appended to every prompt at inference; nothing when absent. */
  readonly promptSuffix?: string
  /** The negative prompt of callers that give none; the null condition when absent. */
  readonly negativePrompt?: string
  /** Features of R prompts; '' is the null condition. The caller disposes them. */
  encode(prompts: readonly string[], options?: EncodeOptions): TextFeatures | Promise<TextFeatures>
  /** Features of each prompt, as if it had been encoded alone, where that is cheaper together. */
  encodeEach?(prompts: readonly string[], options?: EncodeOptions): Promise<TextFeatures[]>
  /** What it takes for so many prompts, where that is worth planning for: bytes that stay, bytes besides, operations. */
  memory?(prompts: number): { readonly kept: number; readonly peak: number; readonly flops: number }
  /** Frees the weights; the encoder cannot be used afterwards. */
  dispose?(): void
}

/** A text encoder so small that nobody waits for it: what a training step can call. */
export interface ImmediateTextEncoder extends TextEncoder {
  encode(prompts: readonly string[], options?: EncodeOptions): TextFeatures
}
