import type { DType } from '../lib/engine/engine.ts'
import { attention as attend } from '../lib/ops/attention.ts'
import { planHistory } from '../lib/pyramid/history.ts'
import { type Layout, makeLayout } from '../lib/pyramid/layout.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { scope } from '../lib/tensor/scope.ts'
import { backward } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { bareMatmul, countFor, type Effort, engineSeconds, interleave, type Row } from './harness.ts'

type Unnamed = Omit<Row, 'group'>

const HEAD_DIM = 64

/** Attention over the tokens of one training batch and over one unit, against the rate of a matrix product. */
export async function attention(effort: Effort): Promise<Unnamed[]> {
  // The published width, or a slice of it where only the working of the bench is of interest.
  const heads = effort.quick ? 2 : 30
  const rows: Unnamed[] = []
  const packed = trainingLayout()
  const length = packed.segment.length
  const pairs = visiblePairs(packed)
  const segment = Tensor.from(packed.segment, [1, length])
  const order = Tensor.from(packed.order, [1, length])
  for (const dtype of ['bf16', 'f32'] as const) {
    rows.push(
      await measure(effort, `dense, 1088 tokens, ${dtype}`, { dtype, heads, length: 1088, pairs: 1088 ** 2 }),
    )
    const share = ((100 * pairs) / length ** 2).toFixed(0)
    const name = `packed training batch, ${length} tokens, ${share} % visible, ${dtype}`
    const mask = { segment, order }
    rows.push(await measure(effort, name, { dtype, heads, length, pairs, mask }))
    rows.push(
      await measure(effort, `${name}, with gradients`, { dtype, heads, length, pairs, mask, train: true }),
    )
  }
  segment.dispose()
  order.dispose()
  return rows
}

interface Problem {
  dtype: DType
  heads: number
  length: number
  /** Pairs (i, j) where token i sees token j: the work that cannot be avoided. */
  pairs: number
  mask?: { segment: Tensor; order: Tensor }
  train?: boolean
}

async function measure(effort: Effort, name: string, problem: Problem): Promise<Unnamed> {
  const { dtype, heads, length, pairs, mask = {}, train = false } = problem
  const generator = new Generator(1)
  const draw = (): Tensor => generator.normal([1, length, heads, HEAD_DIM], { dtype })
  const qkv = [draw(), draw(), draw()] as const
  const seed = draw()
  for (const t of qkv) t.requiresGrad = train
  const op = (): Tensor =>
    scope(() => {
      const o = attend(...qkv, mask)
      if (train) backward(o, seed)
      return o
    })
  // Two products a pair forward, five backward.
  const flops = (train ? 14 : 4) * pairs * heads * HEAD_DIM
  const count = effort.quick ? 1 : await countFor(op, effort.seconds)
  const { ours, ratio } = await interleave(
    { ...effort, rounds: effort.quick ? 1 : Math.min(5, effort.rounds) },
    async () => (1e-9 * flops) / (await engineSeconds(op, count)),
    () => bareMatmul(1088, effort.quick ? 256 : 1920, 1920, dtype, effort.seconds),
  )
  for (const t of qkv) t.grad?.dispose()
  for (const t of [...qkv, seed]) t.dispose()
  return { name, value: ours, unit: 'GFLOP/s', ratio, against: `oneDNN matrix product, ${dtype}` }
}

/** One 384p sample a column at stages 0, 1, 1 and 2, with the history lengths of a four-unit clip. */
function trainingLayout(): Layout {
  const stageCount = 3
  const columns = [0, 1, 1, 2].map((stage) => {
    const unit = stage === stageCount - 1 ? 1 : 2
    const at = (level: number, frames: number) => ({
      frames,
      height: 12 * 2 ** level,
      width: 20 * 2 ** level,
    })
    const history = planHistory(unit, stage, stageCount).map((piece) => at(piece.level, piece.frameCount))
    return { clips: [...history, at(stage, 1)] }
  })
  return makeLayout({ columns, batch: 1, textLength: 128, headAxes: [16, 24, 24], causal: true })
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
