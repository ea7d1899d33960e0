import { engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectDType, expectFloats, expectShape, weightGrad } from './check.ts'

/**
 * Rows of a table by index; an index outside the table is an error of the queue (ERR_SHAPE at the next await).
 *
 * @param table - [V, d]
 * @param idx - i32 [N]
 * @returns [N, d]
 */
export function embedding(table: Tensor, idx: Tensor): Tensor {
  expectFloats('embedding', table)
  expectShape('embedding', 'table [V, d]', table, [null, null])
  expectShape('embedding', 'idx [N]', idx, [null])
  expectDType('embedding', 'idx', idx, 'i32')
  const y = Tensor.empty([idx.shape[0] as number, table.shape[1] as number], table.dtype)
  engine.run('embedding', [table, idx], [y], [])
  if (!needsGrad(table)) return y
  record([table], [y], ([g]) => {
    const to = weightGrad(table)
    engine.run('embedding_backward', [idx, g as Tensor], [to.buffer], [to.accumulate])
    return [to.result()]
  })
  return y
}
