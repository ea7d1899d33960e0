import { copyInto } from '../ops/copy.ts'
import { type LinearOptions, linear } from '../ops/matmul.ts'
import { add, geluTanh, scale as scaled, silu } from '../ops/pointwise.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { whileThere } from './offload.ts'
import type { Init, Weights } from './weights.ts'

/** x [..., K] → act(x·Wᵀ + b) + residual [..., N]. */
export type Linear = (x: Tensor, options?: LinearOptions) => Tensor

/** What an adapter adds to a layer before its activation: scale·(x·Aᵀ)·Bᵀ, of rank r. */
export interface LowRank {
  /** A, [r, K]. */
  readonly a: Tensor
  /** B, [N, r]. */
  readonly b: Tensor
  readonly scale: number
}

/**
 * The layer `weight` [N, K] and, unless `withBias` is false, `bias` [N] below `weights`, with what their adapter adds.
 * For inference the weight is packed for the matrix kernels, once.
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
  const plain: Linear = (x, options) => whileThere(weight, () => linear(x, weight, bias, options))
  const adapter = weights.adapter
  if (!adapter) return plain
  return (x, { activation = 'none', residual, into, column = 0 } = {}) => {
    const y = addLowRank(x, plain(x), adapter)
    const active = activation === 'none' ? y : activation === 'silu' ? silu(y) : geluTanh(y)
    const result = residual ? add(active, residual) : active
    if (!into) return result
    copyInto(result, into, 1, column)
    return into
  }
}

function addLowRank(x: Tensor, y: Tensor, { a, b, scale }: LowRank): Tensor {
  const low = linear(x, a) // [..., r]
  return linear(scale === 1 ? low : scaled(low, scale), b, null, { residual: y })
}
