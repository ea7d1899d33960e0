import { createHash } from 'node:crypto'
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { Lora } from '../lib/lora/lora.ts'
import { loadVelocityNetwork } from '../lib/models/load-network.ts'
import type { VelocityNetwork } from '../lib/models/velocity-network.ts'
import { sliced } from '../lib/tensor/sliced.ts'
import { type GuardEvent, guarded } from '../lib/train/guard.ts'
import type { LatentDataset } from '../lib/train/latents.ts'
import { bestCheckpoint, type TrainEvent } from '../lib/train/run.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { average, collect, losses } from './fixtures/events.ts'
import { live } from './fixtures/memory.ts'
import { tinyLatents, tinyText, writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'lora-train-'))
const model = join(folder, 'model')
const weights = join(model, 'diffusion_transformer')
let data: LatentDataset

beforeAll(async () => {
  await writePipeline(model)
  data = await tinyLatents(join(folder, 'data'), { count: 9 })
})
afterAll(() => {
  data.dispose()
  rmSync(folder, { recursive: true, force: true })
})

const fileHash = (): string =>
  createHash('sha256')
    .update(readFileSync(join(weights, 'diffusion_pytorch_model.safetensors')))
    .digest('hex')

interface Made {
  base: VelocityNetwork
  lora: Lora
  trainer: Trainer
  dispose(): void
}

async function make(
  out: string,
  options: {
    steps: number
    dtype?: 'f32' | 'bf16'
    checkpointing?: number
    learningRate?: number
    /** Clips whose velocities the base gives. */
    kept?: (index: number) => boolean
  },
): Promise<Made> {
  const { dtype = 'f32', checkpointing, kept, ...rest } = options
  const base = await loadVelocityNetwork(weights, { dtype, pack: false })
  const lora = Lora.create(base, { rank: 4 })
  lora.network.checkpointing = checkpointing ?? false
  const trainer = new Trainer({
    ...{ model: lora.network, parameters: lora.parameters, data, text: tinyText(), out },
    ...{ batchSize: 4, seed: 11, learningRate: 1e-2, warmupSteps: 0, optimizer: { emaDecay: 0.5 } },
    write: (dir, tensors) => lora.save(join(dir, 'adapter.safetensors'), { tensors }),
    ...(kept && { teacher: { network: base, clips: kept } }),
    ...rest,
  })
  const dispose = (): void => {
    for (const thing of [trainer, lora, base]) thing.dispose()
  }
  return { base, lora, trainer, dispose }
}

describe('training adapters', () => {
  for (const dtype of ['f32', 'bf16'] as const) {
    test(`lowers the loss and changes nothing but them, in ${dtype}`, async () => {
      const before = fileHash()
      const made = await make(join(folder, `fit-${dtype}`), { steps: 60, dtype })
      const own = new Map<string, Float32Array>()
      for (const [name, t] of made.base.parameters) own.set(name, await t.floats())
      const found = losses(await collect(made.trainer.run()))
      const [first, last] = [average(found.slice(0, 10)), average(found.slice(-10))]
      expect(last, `${first} → ${last}`).toBeLessThan(0.9 * first)
      for (const [name, t] of made.base.parameters) {
        expect(t.grad, name).toBeNull()
        expect(await t.floats(), name).toEqual(own.get(name))
      }
      expect(fileHash()).toBe(before)
      made.dispose()
    })

    test(`continues with the same losses after an abort and a resume, in ${dtype}`, async () => {
      const out = join(folder, `resume-${dtype}`)
      // In f32 recomputed blocks have the bits of kept ones; in bf16 a fused activation is rounded once less.
      const whole = await make(`${out}-whole`, {
        steps: 8,
        dtype,
        ...(dtype === 'bf16' ? { checkpointing: 1 } : {}),
      })
      const straight = losses(await collect(whole.trainer.run()))
      const stop = new AbortController()
      const first = await make(out, { steps: 8, dtype, checkpointing: 1 })
      const begun: TrainEvent[] = []
      const run = async (): Promise<void> => {
        for await (const event of first.trainer.run({ signal: stop.signal })) {
          begun.push(event)
          if (event.type === 'step' && event.step === 4) stop.abort()
        }
      }
      await expect(run()).rejects.toMatchObject({ code: 'ERR_ABORTED' })
      const second = await make(out, { steps: 8, dtype, checkpointing: 1 })
      const continued = losses(await collect(second.trainer.run({ resume: true })))
      expect([...losses(begun), ...continued]).toEqual(straight)
      const trained = (name: string): Buffer =>
        readFileSync(join(name, 'checkpoint-8', 'adapter.safetensors'))
      expect(trained(out)).toEqual(trained(`${out}-whole`))
      for (const made of [whole, first, second]) made.dispose()
    })
  }

  test('writes checkpoints of their own size, with the moving average of the adapters', async () => {
    const out = join(folder, 'checkpoint')
    const made = await make(out, { steps: 3 })
    await collect(made.trainer.run())
    const dir = join(out, 'checkpoint-3')
    expect(readdirSync(dir).sort()).toEqual(['adapter.safetensors', 'optimizer.safetensors', 'state.json'])
    const again = await Lora.load(made.base, join(dir, 'adapter.safetensors'))
    const ema = made.trainer.optimizer.emaTensors()
    for (const [name, t] of again.parameters) {
      expect(await t.floats(), name).toEqual(await ema.get(name)!.floats())
      expect(await t.floats(), name).not.toEqual(await made.lora.parameters.get(name)!.floats())
    }
    for (const t of ema.values()) t.dispose()
    again.dispose()
    made.dispose()
    expect(statSync(join(dir, 'optimizer.safetensors')).size).toBeLessThan(
      0.5 * statSync(join(weights, 'diffusion_pytorch_model.safetensors')).size,
    )
  })

  test('learns nothing from clips on which it is to go on as its base does', async () => {
    const made = await make(join(folder, 'kept'), { steps: 6, kept: () => true })
    const found = losses(await collect(made.trainer.run()))
    // A product with its activation in one pass rounds elsewhere than one with an adapter between the two.
    expect(found[0]).toBeLessThan(1e-12)
    expect(Math.max(...found), `${found}`).toBeLessThan(1e-3)
    made.dispose()
  })

  test('learns the other clips of a batch as it would without a teacher', async () => {
    const plain = await make(join(folder, 'plain'), { steps: 1 })
    const batch = plain.trainer.batch(0)
    const part = batch.parts[0]!
    const lossOf = async (kept?: (index: number) => boolean): Promise<number> => {
      const made = await make(join(folder, 'taught'), { steps: 1, ...(kept && { kept }) })
      const forward = async (): Promise<number> => {
        const value = await sliced(function* () {
          return (yield* made.trainer.forwardSteps(0, batch)).loss
        })
        const [loss] = await value.floats()
        value.dispose()
        return loss as number
      }
      // The first call also fills what the networks remember of a layout.
      const loss = await forward()
      const before = await live()
      expect(await forward()).toBe(loss)
      expect(await live()).toBe(before)
      made.dispose()
      return loss
    }
    const whole = await lossOf()
    expect(await lossOf(() => false)).toBe(whole)
    // One sample a column: what each adds to the mean, the teacher takes away alone.
    const alone: number[] = []
    for (const own of part.indices) alone.push(await lossOf((i) => i !== own))
    expect(Math.min(...alone)).toBeGreaterThan(0)
    expect(alone.reduce((a, b) => a + b)).toBeCloseTo(whole, 5)

    const taught = await make(join(folder, 'plan'), { steps: 1, kept: () => false })
    const [less, more] = [await plain.trainer.plan(), await taught.trainer.plan()]
    // Adapters' own gradients cost as much as forward does; the weights have none.
    expect(more.flops.longest / less.flops.longest).toBeGreaterThan(1.3)
    expect(more.flops.longest / less.flops.longest).toBeLessThan(1.6)
    for (const made of [plain, taught]) made.dispose()
  })

  test('refuses a teacher that is trained itself', async () => {
    const made = await make(join(folder, 'wrong'), { steps: 1 })
    const trained = await loadVelocityNetwork(weights, { train: true, pack: false })
    for (const network of [made.lora.network, trained]) {
      const teacher = { network, clips: () => true }
      const parts = { model: made.lora.network, parameters: made.lora.parameters, data, text: tinyText() }
      const options = { out: join(folder, 'none'), steps: 1, batchSize: 4, learningRate: 1e-3, teacher }
      expect(() => new Trainer({ ...parts, ...options })).toThrow(/teacher.*expected another network/)
    }
    trained.dispose()
    made.dispose()
  })

  test('can be rehearsed and planned, and end with a checkpoint when other clips get worse', async () => {
    const others = await tinyLatents(join(folder, 'others'), { count: 3 })
    const base = await loadVelocityNetwork(weights, { pack: false })
    const lora = Lora.create(base, { rank: 4 })
    const trainer = new Trainer({
      ...{ model: lora.network, parameters: lora.parameters, data, text: tinyText() },
      write: (dir, tensors) => lora.save(join(dir, 'adapter.safetensors'), { tensors }),
      // Steps so large that nothing good comes of them.
      ...{ out: join(folder, 'guard'), steps: 40, batchSize: 4, learningRate: 0.5, warmupSteps: 0 },
      ...{ validation: others, validateEvery: 2, optimizer: { emaDecay: 0.1 } },
    })
    const before = await lora.parameters.get('single_transformer_blocks.0.attn.to_q.lora_A.weight')!.floats()
    expect((await trainer.rehearse()).length).toBeGreaterThan(3)
    expect(
      await lora.parameters.get('single_transformer_blocks.0.attn.to_q.lora_A.weight')!.floats(),
    ).toEqual(before)
    const plan = await trainer.plan()
    expect(plan.bytes.gradients).toBe(4 * trainer.optimizer.size)
    const events: { type: string; step: number }[] = []
    for await (const event of guarded((signal) => trainer.run({ signal }))) events.push(event)
    const last = events.at(-1) as GuardEvent
    expect(last.type).toBe('guard')
    expect(last.step).toBeLessThan(40)
    expect(last.loss).toBeGreaterThan(last.best.loss)
    const best = await bestCheckpoint(join(folder, 'guard'))
    expect(best?.step).toBe(last.best.step)
    expect(readdirSync(best!.path)).toContain('adapter.safetensors')
    for (const thing of [trainer, lora, base, others]) thing.dispose()
  })

  test('takes less memory than training all weights: no gradients, masters and averages of the base', async () => {
    const peakOf = async (run: () => Promise<void>): Promise<number> => {
      const before = await live()
      engine.resetPeak()
      await run()
      return engine.memory().peak - before
    }
    const adapters = await peakOf(async () => {
      const made = await make(join(folder, 'small'), { steps: 2 })
      await collect(made.trainer.run())
      made.dispose()
    })
    const all = await peakOf(async () => {
      const network = await loadVelocityNetwork(weights, { train: true })
      const trainer = new Trainer({
        ...{ model: network, data, text: tinyText(), out: join(folder, 'large'), steps: 2 },
        ...{ batchSize: 4, seed: 11, learningRate: 1e-2, warmupSteps: 0 },
      })
      await collect(trainer.run())
      for (const thing of [trainer, network]) thing.dispose()
    })
    // Half of it here; the base of a real network outweighs everything else.
    expect(adapters, `${adapters} and ${all} bytes`).toBeLessThan(0.6 * all)
  })
})
