import type { LatentNormalisation } from '../flow/normalise.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** Clips of one size, which may stand in a batch together. */
export interface LatentBucket {
  /** [C, T, H, W]. */
  readonly shape: readonly number[]
  /** Positions of its clips, ascending. */
  readonly indices: Int32Array
}

/** What a trainer reads: posteriors and captions of clips. */
export interface LatentSource {
  readonly length: number
  readonly captions: readonly string[]
  readonly normalisation: LatentNormalisation
  readonly buckets: readonly LatentBucket[]
  /** Posterior of clips of ONE bucket: mean and logvar, f32 [B, C, T, H, W]. @throws ERR_OPTION for other positions */
  gather(indices: readonly number[]): { mean: Tensor; logvar: Tensor }
}
