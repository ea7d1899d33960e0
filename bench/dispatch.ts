import { engine } from '../lib/engine/engine.ts'
import { add } from '../lib/ops/pointwise.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { type Effort, engineSeconds, median, type Unnamed } from './harness.ts'

const BATCH = 64

/** Median over batches of the microseconds that one call of `op` keeps JavaScript busy. */
async function queueingCost(effort: Effort, op: () => void): Promise<number> {
  const batches = effort.quick ? 50 : 2000
  const costs: number[] = []
  for (let i = 0; i < batches; i++) {
    const begin = performance.now()
    for (let k = 0; k < BATCH; k++) op()
    costs.push(((performance.now() - begin) * 1000) / BATCH)
    // The engine catches up now and then, so that the queue's length stays that of real work.
    if (i % 8 === 7) await engine.idle()
  }
  await engine.idle()
  return median(costs)
}

async function latency(effort: Effort, wait: () => Promise<unknown>): Promise<number> {
  const times: number[] = []
  for (let i = 0; i < (effort.quick ? 50 : 1000); i++) {
    const begin = performance.now()
    await wait()
    times.push((performance.now() - begin) * 1000)
  }
  return median(times)
}

/** What an op costs besides its arithmetic: for JavaScript to queue it, for the engine to run it, to read a result. */
export async function dispatch(effort: Effort): Promise<Unnamed[]> {
  const a = Tensor.full([16], 1)
  const b = Tensor.full([16], 2)
  const y = Tensor.empty([16])
  const operands = [a, b]
  const results = [y]
  const scalars = [0]
  const command = (): void => engine.run('binary', operands, results, scalars)
  const op = (): void => add(a, b).dispose()
  // Compiled before the clock starts.
  await queueingCost({ ...effort, quick: true }, command)
  await queueingCost({ ...effort, quick: true }, op)
  const rows: Unnamed[] = [
    {
      name: 'queue one op: add(a, b), result made and freed',
      value: await queueingCost(effort, op),
      unit: 'µs',
      required: { of: 'value', atMost: 3 },
    },
    {
      name: 'of that, the command alone (engine.run)',
      value: await queueingCost(effort, command),
      unit: 'µs',
    },
  ]
  const tiny: number[] = []
  const count = effort.quick ? 200 : 5000
  for (let i = 0; i < effort.rounds; i++) tiny.push((await engineSeconds(() => add(a, b), count)) * 1e6)
  rows.push(
    { name: 'run add(a, b) of 16 values, result made and freed', value: median(tiny), unit: 'µs' },
    { name: 'wait for an idle engine', value: await latency(effort, () => engine.idle()), unit: 'µs' },
    { name: 'read 16 values back', value: await latency(effort, () => a.read()), unit: 'µs' },
    {
      name: 'run add(a, b) and read its result',
      value: await latency(effort, async () => {
        const sum = add(a, b)
        await sum.read()
        sum.dispose()
      }),
      unit: 'µs',
    },
  )
  for (const t of [a, b, y]) t.dispose()
  return rows
}
