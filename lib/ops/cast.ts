import { type DType, engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'

const isFloat = (dtype: DType): boolean => dtype !== 'i32' && dtype !== 'u8' && dtype !== 'i64'

/**
 * The same values in another dtype: floats round to nearest even, integers truncate and clamp. Returns `x` itself
 * when it already has that dtype. The gradient is cast back.
 */
export function cast(x: Tensor, dtype: DType): Tensor {
  if (x.dtype === dtype) return x
  const y = Tensor.empty(x.shape, dtype)
  engine.run('cast', [x], [y], [])
  if (needsGrad(x) && isFloat(dtype)) record([x], [y], ([g]) => [g ? cast(g, x.dtype) : null])
  return y
}
