import { tmpdir } from 'node:os'
import { ditConfig } from '../examples/shapes/networks.ts'
import { engine } from '../lib/engine/engine.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { sliced } from '../lib/tensor/sliced.ts'
import { backwardSteps } from '../lib/tensor/tape.ts'
import type { LatentDataset } from '../lib/train/latents.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { breakdown, type Effort, median, type Unnamed } from './harness.ts'
import { withRandomLatents, wordEncoder } from './toy.ts'

/** Longest time in ms between two turns of the event loop while `work` goes on. */
async function longestPause(work: () => Promise<unknown>): Promise<number> {
  let [longest, last, going] = [0, performance.now(), true]
  const turn = (): void => {
    const now = performance.now()
    longest = Math.max(longest, now - last)
    last = now
    if (going) setImmediate(turn)
  }
  setImmediate(turn)
  await work()
  turn()
  going = false
  return longest
}

/** One step's times: JavaScript's, in seconds, the longest pause of the event loop in it, in ms, and the whole. */
export interface StepTime {
  queued: number
  pause: number
  done: number
}

/** Times `runs` times the same step, forward, backward and update: another one would have another length. */
export async function timeSteps(trainer: Trainer, runs: number): Promise<StepTime[]> {
  const times: StepTime[] = []
  for (let i = 0; i < runs; i++) {
    const begin = performance.now()
    const pause = await longestPause(async () => {
      const { loss, clip } = await sliced(function* () {
        const { loss } = yield* trainer.forwardSteps(0, trainer.batch(0))
        yield* backwardSteps(loss)
        return { loss, clip: trainer.optimizer.step(1e-4) }
      })
      loss.dispose()
      clip.dispose()
    })
    const queued = (performance.now() - begin) / 1000
    await engine.idle()
    times.push({ queued, pause, done: (performance.now() - begin) / 1000 })
  }
  return times
}

/** Share of products and attention of the kernels' time. */
export function productShare(ops: ReturnType<typeof engine.profileRead>): number {
  const sum = (list: typeof ops): number => list.reduce((n, op) => n + op.seconds, 0)
  return sum(ops.filter(({ op }) => /^(matmul|attention)/.test(op))) / sum(ops)
}

/** One step of the toy recipe, from latents to updated weights. */
export async function train(effort: Effort): Promise<Unnamed[]> {
  const batchSize = effort.quick ? 4 : 64
  return await withRandomLatents(batchSize, (data) => measure(effort, data, batchSize))
}

async function measure(effort: Effort, data: LatentDataset, batchSize: number): Promise<Unnamed[]> {
  const model = PyramidFluxTransformer.create(ditConfig, { seed: 1, dtype: 'bf16', train: true })
  // Tokens are what the network is called with: text and latents, history included.
  let tokens = 0
  const layoutOf = model.layoutSteps.bind(model)
  model.layoutSteps = function* (inputs) {
    const layout = yield* layoutOf(inputs)
    tokens = layout.textTokens + layout.latentTokens
    return layout
  }
  const trainer = new Trainer({
    model,
    data,
    text: wordEncoder(),
    out: tmpdir(),
    steps: 10,
    batchSize,
    seed: 1,
  })
  try {
    await timeSteps(trainer, 1)
    engine.profile(true)
    const runs = effort.quick ? 1 : 7
    const times = await timeSteps(trainer, runs)
    const ops = engine.profileRead()
    const products = productShare(ops)
    const kernels = ops.reduce((n, op) => n + op.seconds, 0)
    const seconds = median(times.map(({ done }) => done))
    const queued = median(times.map((time) => time.queued))
    return [
      { name: `step of ${batchSize} samples, ${tokens} tokens, bf16`, value: seconds, unit: 's' },
      { name: 'tokens through forward, backward and update', value: tokens / seconds, unit: 'tokens/s' },
      { name: 'JavaScript queueing it, meanwhile', value: queued, unit: 's', share: queued / seconds },
      {
        name: 'longest pause of the event loop in a step',
        value: median(times.map(({ pause }) => pause)),
        unit: 'ms',
        required: { of: 'value', atMost: 10 },
      },
      {
        name: 'matmul and attention',
        value: (1000 * products * kernels) / runs,
        unit: 'ms',
        share: products,
      },
      ...breakdown('step', runs),
    ]
  } finally {
    engine.profile(false)
    trainer.dispose()
    model.dispose()
  }
}
