import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectDType, expectFloats, expectShape, expectThat } from './check.ts'

/**
 * What is done to q and k as they are read, as by the op `rope`: RMS normalisation of each head, then rotation. Nothing
 * is kept for a gradient.
 */
export interface QueryKeyNorm {
  /** [D], or [2, D]: the first `split` tokens of every sequence take the first row, the others the second. */
  readonly weightQ?: Tensor | null | undefined
  /** As `weightQ`. */
  readonly weightK?: Tensor | null | undefined
  /** f32 [B·Lk, D/2], with `sin`: cosines of the angles. */
  readonly cos?: Tensor | null | undefined
  /** f32 [B·Lk, D/2] */
  readonly sin?: Tensor | null | undefined
  /** Default 1e-6. */
  readonly eps?: number | undefined
  /** Default 0. */
  readonly split?: number | undefined
}

/** Options of {@link attention}. */
export interface AttentionOptions {
  /** i32 [B, Lk]: only tokens of the same segment see each other. */
  readonly segment?: Tensor | null | undefined
  /** i32 [B, Lk]: a token sees those of the same or a lower order. */
  readonly order?: Tensor | null | undefined
  /** Default 1/√D. */
  readonly scale?: number | undefined
  /** For inference: norm and rotation of q and k, so that they need no pass of their own. */
  readonly norm?: QueryKeyNorm | null | undefined
}

const ANGLES = ['cos', 'sin'] as const
const WEIGHTS = ['weightQ', 'weightK'] as const

function checkNorm(norm: QueryKeyNorm, q: Tensor, k: Tensor, v: Tensor, masked: boolean): void {
  const d = q.shape[3] as number
  const [b, length] = k.shape as [number, number]
  if (!masked) expectShape('attention', 'k [B, L, H, D] beside a norm', k, q.shape)
  for (const name of WEIGHTS) {
    const weight = norm[name]
    if (!weight) continue
    expectFloats('attention', weight)
    if (weight.rank === 1) expectShape('attention', `${name} [D]`, weight, [d])
    else expectShape('attention', `${name} [2, D]`, weight, [2, d])
  }
  if (!norm.cos !== !norm.sin) {
    throw new PyraflowError('ERR_OPTION', { what: 'attention', expected: 'cos and sin together, or neither' })
  }
  for (const name of ANGLES) {
    const angles = norm[name]
    if (!angles) continue
    expectShape('attention', `${name} [B·Lk, D/2]`, angles, [b * length, d / 2])
    expectDType('attention', name, angles, 'f32')
  }
  if ([q, k, v, norm.weightQ, norm.weightK].some(needsGrad)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'attention',
      expected: 'no gradient of q, k, v and weights beside a norm, which keeps nothing for backward',
      remedy: 'Call it within noGrad, or apply rope to q and k.',
    })
  }
}

/**
 * softmax(scale·q·kᵀ)·v per head, where token i sees token j iff `segment[i] == segment[j] && order[i] >= order[j]`.
 * Both are given or neither. With them k and v may be longer than q, whose tokens are then the first of theirs; without them
 * every token sees every other and k and v may be of any length.
 *
 * @param q - [B, L, H, D]
 * @param k - [B, Lk, H, D]
 * @param v - [B, Lk, H, D]
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
  expectShape('attention', 'k [B, Lk, H, D]', k, [b, null, heads, d])
  expectShape('attention', 'v [B, Lk, H, D]', v, k.shape)
  if (segment && order) {
    const keys = k.shape[1] as number
    expectThat(keys >= length, 'attention', `k of at least the ${length} tokens of q beside a mask`, k)
    expectShape('attention', 'segment [B, Lk]', segment, [b, keys])
    expectShape('attention', 'order [B, Lk]', order, [b, keys])
    expectDType('attention', 'segment', segment, 'i32')
    expectDType('attention', 'order', order, 'i32')
  }
  const scale = options.scale ?? 1 / Math.sqrt(d)
  const norm = options.norm ?? null
  if (norm) checkNorm(norm, q, k, v, segment !== null)
  const o = Tensor.empty(q.shape, q.dtype)
  const lse = Tensor.empty([b, heads, length], 'f32')
  const { weightQ = null, weightK = null, cos = null, sin = null, eps = 1e-6, split = 0 } = norm ?? {}
  const inputs = [q, k, v, segment, order, weightQ, weightK, cos, sin]
  engine.run('attention', inputs, [o, lse], [scale, eps, split])
  if (!needsGrad(q) && !needsGrad(k) && !needsGrad(v)) {
    lse.dispose()
    return o
  }
  record([q, k, v], [o], ([g]) => {
    const grads = [q, k, v].map((t) => Tensor.empty(t.shape, t.dtype))
    engine.run('attention_backward', [q, k, v, segment, order, o, lse, g as Tensor], grads, [scale])
    return grads
  })
  return o
}
