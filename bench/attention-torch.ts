import { engine } from '../lib/engine/engine.ts'
import { type Layout, makeLayout } from '../lib/pyramid/layout.ts'
import { columnOf, type Problem, STAGES, TEXT, withMask, withOp } from './attention-problem.ts'
import { countFor, type Effort, engineSeconds, onGpu, type Required, type Unnamed } from './harness.ts'
import { fastest, type TorchProblem, torchAttention } from './torch.ts'

interface Case {
  name: string
  problem: TorchProblem
  layout?: Layout
  required?: Required
}

/** Attention against every kernel of PyTorch's that takes the problem, on the same device; the fastest of them counts. */
export async function againstTorch(effort: Effort): Promise<Unnamed[]> {
  const cases = effort.quick ? casesOf([256]).slice(0, 1) : casesOf(onGpu() ? [4096, 15_488] : [1088, 4096])
  const { threads } = engine.device
  const device = onGpu() ? 'cuda' : 'cpu'
  const found = torchAttention(
    cases.map(({ problem }) => problem),
    { device, threads, seconds: effort.seconds },
  )
  if (typeof found === 'string') {
    process.stderr.write(`  PyTorch is left out: ${found}\n`)
    return []
  }
  const rows: Unnamed[] = []
  for (const [i, { name, problem, layout, required }] of cases.entries()) {
    const best = fastest(found.answer[i])
    if (!best) continue
    const seconds = await secondsOf(problem, layout, effort)
    const against = `PyTorch ${found.version}, ${best[0]}`
    const row = { name, value: seconds * 1e3, unit: 'ms', ratio: best[1] / seconds, against }
    rows.push(required && onGpu() ? { ...row, required } : row)
  }
  return rows
}

function casesOf(lengths: readonly number[]): Case[] {
  const cases: Case[] = []
  for (const length of lengths) {
    for (const dim of onGpu() ? [64, 128] : [64]) {
      const problem = { dtype: 'bf16', heads: 30, length, dim } as const
      const bound = dim === 64
      cases.push(
        {
          name: `dense, ${length} tokens, head dim ${dim}, bf16`,
          problem: { ...problem, backward: false },
          ...(bound && { required: { of: 'ratio', atLeast: 1 } as const }),
        },
        {
          name: `dense, ${length} tokens, head dim ${dim}, bf16, backward`,
          problem: { ...problem, backward: true },
          ...(bound && { required: { of: 'ratio', atLeast: 0.9 } as const }),
        },
      )
    }
  }
  if (!onGpu()) return cases
  for (const [label, height, width] of [
    ['384p', 48, 80],
    ['768p', 96, 160],
  ] as const) {
    const columns = [columnOf(15, STAGES - 1, height, width)]
    const layout = makeLayout({ columns, batch: 1, textLength: TEXT, headAxes: [16, 24, 24], causal: true })
    const mask = { segment: [...layout.segment], order: [...layout.order] }
    const length = layout.segment.length
    cases.push({
      name: `${label} unit 15, last stage, ${length} tokens, bf16`,
      problem: { dtype: 'bf16', heads: 30, length, dim: 64, backward: false, mask },
      layout,
      required: { of: 'ratio', atLeast: 1.5 },
    })
  }
  return cases
}

async function secondsOf(problem: TorchProblem, layout: Layout | undefined, effort: Effort): Promise<number> {
  const { dtype, heads, length, dim, backward } = problem
  const base = { dtype, heads, length, dim, pairs: 1, ...(backward && { pass: 'backward' as const }) }
  let seconds = Number.NaN
  const run = (mask?: Problem['mask']): Promise<void> =>
    withOp({ ...base, ...(mask && { mask }) }, async (op) => {
      seconds = await engineSeconds(op, effort.quick ? 1 : await countFor(op, effort.seconds))
    })
  if (layout) await withMask(layout, (mask) => run(mask))
  else await run()
  return seconds
}
