import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { createVelocityNetwork } from '../lib/models/load-network.ts'
import { scope } from '../lib/tensor/scope.ts'
import { backward } from '../lib/tensor/tape.ts'
import { type PlanTrainingOptions, planTraining, type TrainingPlan } from '../lib/train/plan.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { memorySource } from './fixtures/latent-source.ts'
import { tinyText } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'trainer-plan-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const SIZES = {
  attention_head_dim: 32,
  num_attention_heads: 4,
  joint_attention_dim: 12,
  pooled_projection_dim: 12,
}
const FLUX = { ...SIZES, num_layers: 1, num_single_layers: 2, axes_dims_rope: [8, 12, 12] }
const MMDIT = { ...SIZES, _class_name: 'PyramidDiffusionMMDiT', num_layers: 2 }
const VIDEO = { shape: [16, 5, 16, 24] as const, clips: 8 }

type Config = Omit<PlanTrainingOptions, 'text' | 'buckets'> & {
  buckets?: { shape: readonly [number, number, number, number]; clips: number }[]
}

/** The same setting as a plan and as a trainer. */
async function both(config: Config): Promise<{
  planned: TrainingPlan
  trainer: Trainer
  dispose: () => void
}> {
  const { network, dtype = 'f32', buckets = [VIDEO], rates, ...rest } = config
  const text = tinyText()
  const planned = await planTraining({ ...config, buckets, text })
  const model = createVelocityNetwork(network, { seed: 1, dtype, train: true })
  const trainer = new Trainer({ ...rest, model, text, data: memorySource(buckets), out: folder, steps: 4 })
  const dispose = (): void => {
    trainer.dispose()
    model.dispose()
  }
  return { planned, trainer, dispose }
}

/** Most bytes that a step took, over all lengths that steps have. */
async function measured(trainer: Trainer, others: number): Promise<number> {
  let most = 0
  for (let step = 0; step < 5; step++) {
    await engine.idle()
    engine.resetPeak()
    scope(() => {
      backward(trainer.forward(step, trainer.batch(step)).loss)
      trainer.optimizer.step(1e-4)
    })
    await engine.idle()
    most = Math.max(most, engine.memory().peak - others)
  }
  return most
}

describe('a training plan', () => {
  const configs: [string, Config][] = [
    ['flux in f32', { network: FLUX, batchSize: 8 }],
    ['flux in bf16', { network: FLUX, batchSize: 8, dtype: 'bf16' }],
    [
      'flux in bf16 with recomputed blocks',
      { network: FLUX, batchSize: 8, dtype: 'bf16', checkpointRatio: 1 },
    ],
    ['flux on whole clips', { network: FLUX, batchSize: 4, temporalPyramid: false, causal: false }],
    [
      'flux on videos and images',
      { network: FLUX, batchSize: 16, imageRatio: 0.25, images: 'frames', dtype: 'bf16' },
    ],
    [
      'mmdit in bf16 without average',
      { network: MMDIT, batchSize: 8, dtype: 'bf16', optimizer: { emaDecay: 0 } },
    ],
  ]
  for (const [name, config] of configs) {
    test(`knows the memory of ${name} to a tenth`, async () => {
      await engine.idle()
      const others = engine.memory().live
      const { planned, trainer, dispose } = await both(config)
      const real = await measured(trainer, others)
      const { peak } = planned.bytes
      expect(peak / real, `planned ${peak}, measured ${real}`).toBeGreaterThan(0.9)
      expect(peak / real, `planned ${peak}, measured ${real}`).toBeLessThan(1.1)
      // Activations by themselves are no worse.
      const held = peak - planned.bytes.activations
      expect(planned.bytes.activations / (real - held)).toBeGreaterThan(0.85)
      expect(planned.bytes.activations / (real - held)).toBeLessThan(1.15)
      // The trainer that is there plans the same.
      expect(await trainer.plan()).toEqual(planned)
      dispose()
    })
  }

  test('allocates nothing, and leaves the trainer as it was', async () => {
    const { trainer, dispose } = await both({ network: FLUX, batchSize: 8 })
    await engine.idle()
    const before = engine.memory().live
    engine.resetPeak()
    const plan = await trainer.plan()
    expect(await trainer.plan()).toEqual(plan)
    await engine.idle()
    expect(engine.memory()).toMatchObject({ live: before, peak: before })
    expect(trainer.optimizer.stepCount).toBe(0)
    const { weights, masters, gradients, moments, ema, data, activations, peak } = plan.bytes
    expect(peak).toBe(weights + masters + gradients + moments + ema + data + activations)
    expect(before).toBeGreaterThanOrEqual(weights + masters + gradients + moments + ema)
    dispose()
  })

  test('counts the tokens of the specification for 384p clips of 16 latent frames', async () => {
    const plan = (rank: number): ReturnType<typeof planTraining> =>
      planTraining({
        ...{ network: FLUX, batchSize: 4, rank, syncGroup: 8, buckets: [{ shape: [16, 16, 48, 80] }] },
        text: { jointDim: 12, pooledDim: 12, maxLength: 128 },
      })
    // Of one set of samples, with the text of four sequences.
    expect((await plan(0)).tokens).toEqual({ longest: 4680 + 512, shortest: 4560 + 512, mean: 4620 + 512 })
    expect((await plan(1)).tokens).toMatchObject({ longest: 5340 + 512, shortest: 4560 + 512 })
    expect((await plan(7)).tokens).toMatchObject({ longest: 4800 + 512, shortest: 3480 + 512 })
  })

  test('counts operations by layers, tokens and pairs, and seconds by rates', async () => {
    const make = (options: Partial<PlanTrainingOptions> = {}): ReturnType<typeof planTraining> =>
      planTraining({ network: FLUX, batchSize: 8, buckets: [VIDEO], text: tinyText(), ...options })
    const one = await make()
    const { attention_head_dim: d, num_attention_heads: h } = SIZES
    const width = d * h
    // 12 d² a token and block, thrice for forward and both gradients; conditioning and ends come on top.
    const blocks = 3 * 2 * 12 * width ** 2 * 3 * one.tokens.longest
    expect(one.flops.longest).toBeGreaterThan(blocks)
    expect(one.flops.longest).toBeLessThan(1.4 * blocks)
    expect((await make({ accumulate: 3 })).flops.mean).toBeCloseTo(3 * one.flops.mean, -3)
    // A third pass over the blocks.
    expect((await make({ checkpointRatio: 1 })).flops.mean / one.flops.mean).toBeGreaterThan(1.25)
    expect(one.seconds).toBeUndefined()
    const rates = { matmul: 1e9, attention: 1e8, conv: 1, read: 1 }
    const seconds = (await make({ rates })).seconds!
    expect(seconds.longest).toBeGreaterThan(one.flops.longest / 1e9)
    expect(seconds.mean).toBeLessThanOrEqual(seconds.longest)
    const causal = (await make({ temporalPyramid: false, causal: true, rates })).seconds!
    const free = (await make({ temporalPyramid: false, causal: false, rates })).seconds!
    expect(free.mean).toBeGreaterThan(causal.mean)
  })

  test('refuses what a trainer refuses', async () => {
    const wrong = { network: FLUX, batchSize: 6, buckets: [VIDEO], text: tinyText() }
    await expect(planTraining(wrong)).rejects.toMatchObject({ code: 'ERR_OPTION' })
  })
})
