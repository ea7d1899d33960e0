import type { Tensor } from '../tensor/tensor.ts'
import { linearLayer } from './linear.ts'
import type { Weights } from './weights.ts'

/** FF(x) = W₂·GELU_tanh(W₁·x), hidden width 4d (spec/dit-flux.md eq. 11); keys `net.0.proj` and `net.2`. */
export function feedForward(weights: Weights, width: number): (x: Tensor) => Tensor {
  const up = linearLayer(weights.sub('net.0.proj'), width, 4 * width)
  const down = linearLayer(weights.sub('net.2'), 4 * width, width)
  return (x) => down(up(x, { activation: 'geluTanh' }))
}
