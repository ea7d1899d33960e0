import type { LatentNormalisation } from '../flow/normalise.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** Clips of one latent size; a batch is made of clips of one bucket. */
export interface LatentBucket {
  /** [C, T, H, W] */
  readonly shape: readonly number[]
  /** positions of its clips */
  readonly indices: Int32Array
}

/** What a trainer reads: captions and the VAE's posteriors of clips, whatever keeps them. */
export interface LatentSource {
  readonly length: number
  readonly captions: readonly string[]
  readonly normalisation: LatentNormalisation
  readonly buckets: readonly LatentBucket[]
  /** Posterior of clips of ONE bucket: mean and logvar, f32 [B, C, T, H, W]. */
  gather(indices: readonly number[]): { mean: Tensor; logvar: Tensor }
}
