import { type DType, engine } from '../lib/engine/engine.ts'
import { attention as attend } from '../lib/ops/attention.ts'
import { planHistory } from '../lib/pyramid/history.ts'
import type { Column, Layout } from '../lib/pyramid/layout.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { scope } from '../lib/tensor/scope.ts'
import { Tensor } from '../lib/tensor/tensor.ts'

// Attention calls to be measured, and the sequences of the published models.
export const HEAD_DIM = 64
export const STAGES = 3
export const TEXT = 128

export interface Problem {
  dtype: DType
  heads: number
  length: number
  /** Channels of a head, 64 if absent. */
  dim?: number
  /** Pairs (i, j) where token i sees token j: the work that cannot be avoided. */
  pairs: number
  mask?: { segment: Tensor; order: Tensor }
  /** Which part is timed; forward if absent. */
  pass?: 'backward'
}

/** Hands `use` the op of a problem, and what one run of it computes. */
export async function withOp<T>(
  problem: Problem,
  use: (op: () => Tensor, flops: number) => Promise<T>,
): Promise<T> {
  const { dtype, heads, length, pairs, mask, pass, dim = HEAD_DIM } = problem
  const generator = new Generator(1)
  const shape = [1, length, heads, dim]
  const draw = (): Tensor => generator.normal(shape, { dtype })
  const [q, k, v] = [draw(), draw(), draw()]
  const owned = [q, k, v]
  const empty = (): Tensor => Tensor.empty(shape, dtype)
  let op = (): Tensor => attend(q, k, v, mask)
  if (pass) {
    const [o, lse, g] = [empty(), Tensor.empty([1, heads, length], 'f32'), draw()]
    owned.push(o, lse, g)
    const masks = [mask?.segment ?? null, mask?.order ?? null]
    const scale = 1 / Math.sqrt(dim)
    engine.run('attention', [q, k, v, ...masks], [o, lse], [scale, 0, 0])
    op = () =>
      scope(() => {
        const grads = [empty(), empty(), empty()]
        engine.run('attention_backward', [q, k, v, ...masks, o, lse, g], grads, [scale])
        return grads[0] as Tensor
      })
  }
  try {
    // Two products a pair forward, five backward.
    return await use(op, (pass ? 10 : 4) * pairs * heads * dim)
  } finally {
    for (const t of owned) t.dispose()
  }
}

/** Hands `use` the masks of a layout, its length, and its visible pairs. */
export async function withMask(
  layout: Layout,
  use: (mask: { segment: Tensor; order: Tensor }, length: number, pairs: number) => Promise<void>,
): Promise<void> {
  const length = layout.segment.length
  const segment = Tensor.from(layout.segment, [1, length])
  const order = Tensor.from(layout.order, [1, length])
  await use({ segment, order }, length, visiblePairs(layout))
  segment.dispose()
  order.dispose()
}

/** Unit `unit` at a stage with its history, of a video whose full-size latent is height × width. */
export function columnOf(unit: number, stage: number, height: number, width: number): Column {
  const at = (level: number, frames: number) => {
    const shrink = 2 ** (STAGES - 1 - level)
    return { frames, height: height / shrink, width: width / shrink }
  }
  const history = planHistory(unit, stage, STAGES).map((piece) => at(piece.level, piece.frameCount))
  return { clips: [...history, at(stage, 1)] }
}

function visiblePairs({ segment, order }: Layout): number {
  const tokens = new Map<number, Map<number, number>>()
  segment.forEach((s, i) => {
    const counts = tokens.get(s) ?? new Map<number, number>()
    counts.set(order[i] as number, (counts.get(order[i] as number) ?? 0) + 1)
    tokens.set(s, counts)
  })
  let pairs = 0
  for (const counts of tokens.values()) {
    let seen = 0
    for (const [, count] of [...counts].sort(([a], [b]) => a - b)) {
      seen += count
      pairs += count * seen
    }
  }
  return pairs
}
