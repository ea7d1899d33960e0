import { tmpdir } from 'node:os'
import { ditConfig } from '../examples/shapes/networks.ts'
import { engine } from '../lib/engine/engine.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { scope } from '../lib/tensor/scope.ts'
import { backward } from '../lib/tensor/tape.ts'
import type { LatentDataset } from '../lib/train/latents.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { breakdown, type Effort, median, type Row } from './harness.ts'
import { withRandomLatents, wordEncoder } from './toy.ts'

type Unnamed = Omit<Row, 'group'>

/** One step of the toy recipe, from latents to updated weights. */
export async function train(effort: Effort): Promise<Unnamed[]> {
  const batchSize = effort.quick ? 4 : 64
  return await withRandomLatents(batchSize, (data) => measure(effort, data, batchSize))
}

async function measure(effort: Effort, data: LatentDataset, batchSize: number): Promise<Unnamed[]> {
  const model = PyramidFluxTransformer.create(ditConfig, { seed: 1, dtype: 'bf16', train: true })
  // Tokens are what the network is called with: text and latents, history included.
  let tokens = 0
  const layoutOf = model.layout.bind(model)
  model.layout = (inputs) => {
    const layout = layoutOf(inputs)
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
  // The same step each time: another one would have another length.
  const step = async (): Promise<{ queued: number; done: number }> => {
    const begin = performance.now()
    scope(() => {
      const { loss } = trainer.forward(0, trainer.indices(0))
      backward(loss)
      trainer.optimizer.step(1e-4)
    })
    const queued = (performance.now() - begin) / 1000
    await engine.idle()
    return { queued, done: (performance.now() - begin) / 1000 }
  }
  try {
    await step()
    const times: { queued: number; done: number }[] = []
    engine.profile(true)
    const runs = effort.quick ? 1 : 3
    for (let i = 0; i < runs; i++) times.push(await step())
    const ops = engine.profileRead()
    const sum = (list: typeof ops): number => list.reduce((n, op) => n + op.seconds, 0)
    const products = sum(ops.filter(({ op }) => /^(matmul|attention)/.test(op)))
    const seconds = median(times.map(({ done }) => done))
    const queued = median(times.map((time) => time.queued))
    return [
      { name: `step of ${batchSize} samples, ${tokens} tokens, bf16`, value: seconds, unit: 's' },
      { name: 'tokens through forward, backward and update', value: tokens / seconds, unit: 'tokens/s' },
      { name: 'JavaScript queueing it, meanwhile', value: queued, unit: 's', share: queued / seconds },
      {
        name: 'matmul and attention',
        value: (1000 * products) / runs,
        unit: 'ms',
        share: products / sum(ops),
      },
      ...breakdown('step', runs),
    ]
  } finally {
    engine.profile(false)
    trainer.dispose()
    model.dispose()
  }
}
