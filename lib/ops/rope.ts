import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectDType, expectFloats, expectShape, weightGrad } from './check.ts'

/** Options of {@link rope}. */
export interface RopeOptions {
  /** [D]: RMS normalisation of each head before the rotation. */
  readonly weight?: Tensor | null | undefined
  /** f32 [N, D/2], with `sin`: cosines of the angles. */
  readonly cos?: Tensor | null | undefined
  /** f32 [N, D/2] */
  readonly sin?: Tensor | null | undefined
  /** Default 1e-6. */
  readonly eps?: number | undefined
}

/**
 * Head-wise RMS normalisation x/√(mean(x²) + eps)·weight, then rotation of neighbouring pairs:
 * (y₂ᵢ, y₂ᵢ₊₁) = (x₂ᵢ·cosᵢ − x₂ᵢ₊₁·sinᵢ, x₂ᵢ·sinᵢ + x₂ᵢ₊₁·cosᵢ). Either half may be left out.
 *
 * @param x - [N, H, D] or [B, L, H, D] with N = B·L
 */
export function rope(x: Tensor, options: RopeOptions = {}): Tensor {
  const weight = options.weight ?? null
  const cos = options.cos ?? null
  const sin = options.sin ?? null
  expectFloats('rope', x, weight)
  if (x.rank !== 4) expectShape('rope', 'x [N, H, D]', x, [null, null, null])
  const [heads, d] = x.shape.slice(-2) as [number, number]
  const n = d * heads === 0 ? 0 : x.size / (d * heads)
  if (weight) expectShape('rope', 'weight [D]', weight, [d])
  if ((cos === null) !== (sin === null)) {
    throw new PyraflowError('ERR_OPTION', { what: 'rope', expected: 'cos and sin together, or neither' })
  }
  if (cos && sin) {
    expectShape('rope', 'cos [N, D/2]', cos, [n, d / 2])
    expectShape('rope', 'sin [N, D/2]', sin, [n, d / 2])
    expectDType('rope', 'cos', cos, 'f32')
    expectDType('rope', 'sin', sin, 'f32')
  }
  if (!weight && !cos) return x

  const forX = needsGrad(x)
  const forWeight = weight !== null && needsGrad(weight)
  const wanted = forX || forWeight
  const shape = [n, heads, d]
  const fold = (t: Tensor) => ({ storage: t.storage, byteOffset: t.byteOffset, dtype: t.dtype, shape })
  const y = Tensor.empty(x.shape, x.dtype)
  const rstd = wanted && weight ? Tensor.empty([n, heads], 'f32') : null
  engine.run('rope', [fold(x), weight, cos, sin], [fold(y), rstd], [options.eps ?? 1e-6])
  if (!wanted) return y
  record([x, weight], [y], ([g]) => {
    const dx = Tensor.empty(x.shape, x.dtype)
    const dw = forWeight ? weightGrad(weight as Tensor) : null
    engine.run(
      'rope_backward',
      [fold(x), weight, cos, sin, rstd, fold(g as Tensor)],
      [fold(dx), dw?.buffer ?? null],
      [dw?.accumulate ?? 0],
    )
    return [dx, dw?.result() ?? null]
  })
  return y
}
