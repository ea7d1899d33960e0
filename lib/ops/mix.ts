import { engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectDType, expectFloats, expectShape, shaped } from './check.ts'

// σ·a + (1 − σ)·b with either operand absent (zero).
function mixed(a: Tensor | null, b: Tensor | null, sigma: Tensor, like: Tensor): Tensor {
  const batch = like.shape[0] as number
  const rows = [batch, batch === 0 ? 0 : like.size / batch]
  const y = Tensor.empty(like.shape, like.dtype)
  engine.run('mix', [a && shaped(a, rows), b && shaped(b, rows), sigma], [shaped(y, rows)], [])
  return y
}

/**
 * σ·a + (1 − σ)·b, with one σ per sample: the point between noise and data.
 *
 * @param a - [B, ...]
 * @param b - [B, ...]
 * @param sigma - f32 [B]; gets no gradient
 */
export function mix(a: Tensor, b: Tensor, sigma: Tensor): Tensor {
  expectFloats('mix', a, b)
  expectShape('mix', 'b as a', b, a.shape)
  expectShape('mix', 'sigma [B]', sigma, [a.shape[0] ?? 0])
  expectDType('mix', 'sigma', sigma, 'f32')
  const y = mixed(a, b, sigma, a)
  const [forA, forB] = [needsGrad(a), needsGrad(b)]
  if (!forA && !forB) return y
  record([a, b], [y], ([g]) => [
    forA ? mixed(g as Tensor, null, sigma, a) : null,
    forB ? mixed(null, g as Tensor, sigma, b) : null,
  ])
  return y
}
