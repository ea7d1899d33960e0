import { engine } from '../engine/engine.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectDType } from './check.ts'

/**
 * The norm of a gradient and the factor that clips it: f32 [2] = (‖g‖₂, min(1, maxNorm/(‖g‖₂ + 1e-6))). A
 * `maxNorm` of 0 or less means no clipping; a norm that is not finite gives the factor NaN.
 *
 * @param g - f32, any shape
 */
export function gradNorm(g: Tensor, maxNorm: number): Tensor {
  expectDType('gradNorm', 'g', g, 'f32')
  const result = Tensor.empty([2], 'f32')
  engine.run('grad_norm', [g], [result], [maxNorm])
  return result
}
