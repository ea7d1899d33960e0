import { chunk, reshape } from '../ops/copy.ts'
import { normModulate } from '../ops/norm.ts'
import { scale as scaled } from '../ops/pointwise.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { linearLayer } from './linear.ts'
import type { Weights } from './weights.ts'

/**
 * Modulation vectors Linear(d → n·d)(e), e = SiLU(temb) [R, d], as n tensors [R, d] (spec/dit-flux.md §5). The layer
 * begins at zero, so an untrained block passes its input on.
 */
export function modulation(weights: Weights, width: number, n: number): (e: Tensor) => Tensor[] {
  const project = linearLayer(weights.sub('linear'), width, n * width, 'zeros')
  return (e) => chunk(project(e), 1, n)
}

/** mod(x; shift, scale) = LN0(x)·(1 + scale) + shift (7), each token of x [N, d] with the row it belongs to. */
export function modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor): Tensor {
  return normModulate(x, { shift, scale, rows })
}

/** The head's norm; its two chunks come in the order scale, shift. */
export function modulatedNorm(
  weights: Weights,
  width: number,
): (x: Tensor, e: Tensor, rows: Tensor) => Tensor {
  const vectors = modulation(weights, width, 2)
  return (x, e, rows) => {
    const [scale, shift] = vectors(e) as [Tensor, Tensor]
    return modulate(x, shift, scale, rows)
  }
}

/** LN0(x)·weight + bias over the last axis; both are kept in f32, because the kernel wants weight − 1. */
export function affineNorm(weights: Weights, width: number, eps: number): (x: Tensor) => Tensor {
  const weight = weights.get('weight', [width], 'ones', { dtype: 'f32' })
  const bias = weights.get('bias', [width], 'zeros', { dtype: 'f32' })
  const row = [1, width]
  return (x) =>
    normModulate(x, { scale: reshape(scaled(weight, 1, -1), row), shift: reshape(bias, row), eps })
}
