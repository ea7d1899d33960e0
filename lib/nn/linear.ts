import { type LinearOptions, linear } from '../ops/matmul.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { Init, Weights } from './weights.ts'

/** x [..., K] → act(x·Wᵀ + b) + residual [..., N]. */
export type Linear = (x: Tensor, options?: LinearOptions) => Tensor

/**
 * The layer `weight` [N, K] and, unless `withBias` is false, `bias` [N] below `weights`. For inference the weight is packed for the matrix
 * kernels, once.
 */
export function linearLayer(
  weights: Weights,
  inputs: number,
  outputs: number,
  init: Init = 'xavier',
  withBias = true,
): Linear {
  const weight = weights.get('weight', [outputs, inputs], init, { matrix: true })
  const bias = withBias ? weights.get('bias', [outputs], 'zeros') : null
  return (x, options) => linear(x, weight, bias, options)
}
