import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectDType, expectFloats, expectShape } from './check.ts'

/** Options of {@link attention}. */
export interface AttentionOptions {
  /** i32 [B, L]: only tokens of the same segment see each other. */
  readonly segment?: Tensor | null | undefined
  /** i32 [B, L]: a token sees those of the same or a lower order. */
  readonly order?: Tensor | null | undefined
  /** Default 1/√D. */
  readonly scale?: number | undefined
}

/**
 * softmax(scale·q·kᵀ)·v per head, where token i sees token j iff `segment[i] == segment[j] && order[i] >= order[j]`.
 * Both are given or neither; without them every token sees every other and k and v may be of another length than q.
 *
 * @param q - [B, L, H, D]
 * @param k - [B, L, H, D]
 * @param v - [B, L, H, D]
 * @returns [B, L, H, D]; zero where nothing is visible
 */
export function attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = {}): Tensor {
  const segment = options.segment ?? null
  const order = options.order ?? null
  expectFloats('attention', q, k, v)
  expectShape('attention', 'q [B, L, H, D]', q, [null, null, null, null])
  const [b, length, heads, d] = q.shape as [number, number, number, number]
  if ((segment === null) !== (order === null)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'attention',
      expected: 'segment and order together, or neither',
      received: segment ? 'segment alone' : 'order alone',
    })
  }
  expectShape('attention', 'k [B, L, H, D]', k, [b, segment ? length : null, heads, d])
  expectShape('attention', 'v [B, L, H, D]', v, k.shape)
  if (segment && order) {
    expectShape('attention', 'segment [B, L]', segment, [b, length])
    expectShape('attention', 'order [B, L]', order, [b, length])
    expectDType('attention', 'segment', segment, 'i32')
    expectDType('attention', 'order', order, 'i32')
  }
  const scalars = [options.scale ?? 1 / Math.sqrt(d)]
  const o = Tensor.empty(q.shape, q.dtype)
  const lse = Tensor.empty([b, heads, length], 'f32')
  engine.run('attention', [q, k, v, segment, order], [o, lse], scalars)
  if (!needsGrad(q) && !needsGrad(k) && !needsGrad(v)) {
    lse.dispose()
    return o
  }
  record([q, k, v], [o], ([g]) => {
    const grads = [q, k, v].map((t) => Tensor.empty(t.shape, t.dtype))
    engine.run('attention_backward', [q, k, v, segment, order, o, lse, g as Tensor], grads, scalars)
    return grads
  })
  return o
}
