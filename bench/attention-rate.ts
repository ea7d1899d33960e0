import { withOp } from './attention-problem.ts'
import { engineSeconds } from './harness.ts'

// GFLOP/s of dense f32 attention at the level that the environment asks for, on stdout: length, heads, runs.
const [length, heads, count] = process.argv.slice(2).map(Number) as [number, number, number]
const problem = { dtype: 'f32', heads, length, pairs: length ** 2 } as const
const seconds = await withOp(problem, async (op, flops) => (await engineSeconds(op, count)) / flops)
process.stdout.write(`${1e-9 / seconds}\n`)
