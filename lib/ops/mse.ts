import { engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectShape, expectThat, shaped } from './check.ts'

/**
 * Mean squared error of each sample: mean over all but the first axis of (pred − target)².
 *
 * @param pred - [B, ...]
 * @param target - [B, ...]
 * @returns f32 [B]
 */
export function mse(pred: Tensor, target: Tensor): Tensor {
  expectFloats('mse', pred, target)
  expectThat(pred.rank >= 1 && pred.size > 0, 'mse', 'pred [B, ...] with elements', pred)
  expectShape('mse', 'target as pred', target, pred.shape)
  const batch = pred.shape[0] as number
  const rows = [batch, pred.size / batch]
  const loss = Tensor.empty([batch], 'f32')
  engine.run('mse', [shaped(pred, rows), shaped(target, rows)], [loss], [])
  const [forPred, forTarget] = [needsGrad(pred), needsGrad(target)]
  if (!forPred && !forTarget) return loss
  record([pred, target], [loss], ([g]) => {
    const gradient = (of: Tensor, other: Tensor) => {
      const d = Tensor.empty(of.shape, of.dtype)
      engine.run('mse_backward', [shaped(of, rows), shaped(other, rows), g as Tensor], [shaped(d, rows)], [])
      return d
    }
    // The error is symmetric, so the target's gradient is the same kernel with the operands exchanged.
    return [forPred ? gradient(pred, target) : null, forTarget ? gradient(target, pred) : null]
  })
  return loss
}
