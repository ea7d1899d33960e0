import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import type { CausalVideoVAE } from '../lib/models/causal-vae.ts'
import { scope } from '../lib/tensor/scope.ts'
import { backward } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { Trainer, type TrainerOptions } from '../lib/train/trainer.ts'
import { validationBatches } from '../lib/train/validation.ts'
import { memorySource } from './fixtures/latent-source.ts'
import { scramble, tinyDit, tinyText, tinyVae } from './fixtures/tiny.ts'
import { live } from './gradcheck.ts'

const folder = mkdtempSync(join(tmpdir(), 'trainer-watching-'))
let vae: CausalVideoVAE
beforeAll(async () => {
  vae = tinyVae()
  scramble(vae.parameters)
  await vae.save(join(folder, 'vae'))
})
afterAll(() => {
  vae.dispose()
  rmSync(folder, { recursive: true, force: true })
})

type Compute = 'f32' | 'bf16'
const held = memorySource(
  [
    { shape: [16, 3, 8, 8], clips: 3 },
    { shape: [16, 1, 8, 16], clips: 1 },
  ],
  { seed: 9 },
)

function trainerOf(options: Partial<TrainerOptions> & { dtype?: Compute } = {}) {
  const { dtype = 'f32', ...rest } = options
  const model = tinyDit({ train: true, dtype })
  scramble(model.parameters)
  const trainer = new Trainer({
    ...{ model, text: tinyText(), out: join(folder, 'run'), steps: 4, batchSize: 4, seed: 3 },
    ...{ learningRate: 1e-2, warmupSteps: 0, data: memorySource([{ shape: [16, 3, 8, 8], clips: 8 }]) },
    validation: held,
    ...rest,
  })
  const dispose = (): void => {
    trainer.dispose()
    model.dispose()
  }
  return { trainer, model, dispose }
}

/** Every number that a training step changes, and what the next one would give. */
async function stateOf({ trainer, model }: ReturnType<typeof trainerOf>): Promise<number[][]> {
  const values: number[][] = [[trainer.optimizer.stepCount]]
  for (const { data } of trainer.optimizer.stateTensors()) {
    const list = typeof data === 'function' ? await data() : data
    values.push(Array.from(list as Float32Array))
  }
  for (const p of model.parameters.values()) {
    values.push(Array.from(await p.floats()), Array.from(await p.grad!.floats()))
  }
  return values
}

async function step(trainer: Trainer, n: number): Promise<number> {
  const loss = scope(() => {
    const found = trainer.forward(n, trainer.batch(n)).loss
    backward(found)
    trainer.optimizer.step(1e-2)
    return found
  })
  const value = await loss.item()
  loss.dispose()
  return value
}

describe('validation', () => {
  test('shows every clip at every stage once', () => {
    const batches = validationBatches(held, 3, { batchSize: 7 })
    expect(batches.map(({ rows }) => rows)).toEqual([2, 1, 1])
    const pairs = batches.flatMap(({ parts }) =>
      parts.flatMap(({ indices, columns }) => indices.map((clip, i) => `${clip}@${columns[i % 3]}`)),
    )
    expect(pairs.sort()).toEqual([0, 1, 2, 3].flatMap((clip) => [0, 1, 2].map((k) => `${clip}@${k}`)))
    expect(validationBatches(held, 3, { batchSize: 7, clips: 2 }).map(({ rows }) => rows)).toEqual([2])
  })

  for (const dtype of ['f32', 'bf16'] as const) {
    test(`gives the same losses until the weights change, and leaves training alone, in ${dtype}`, async () => {
      const made = trainerOf({ dtype })
      await step(made.trainer, 0)
      const before = await stateOf(made)
      const first = await made.trainer.validate()
      expect(Object.keys(first)).toEqual(['loss', 'stage0', 'stage1', 'stage2'])
      const { loss, stage0, stage1, stage2 } = first as Record<string, number>
      expect(loss).toBeCloseTo((stage0! + 2 * stage1! + stage2!) / 4, 6)
      expect(await made.trainer.validate()).toEqual(first)
      expect(await stateOf(made)).toEqual(before)
      await step(made.trainer, 1)
      expect((await made.trainer.validate()).loss).not.toBe(loss)
      made.dispose()
      expect(await live()).toBe(await vaeBytes())
    })
  }

  test('is of the moving average of the weights', async () => {
    const losses: number[] = []
    for (const emaDecay of [0, 0.9]) {
      const made = trainerOf({ optimizer: { emaDecay } })
      for (let n = 0; n < 3; n++) await step(made.trainer, n)
      losses.push((await made.trainer.validate()).loss)
      made.dispose()
    }
    expect(losses[0]).not.toBe(losses[1])
  })

  test('is refused without clips', async () => {
    const { trainer, model } = trainerOf()
    const bare = new Trainer({
      ...{ model, text: tinyText(), out: folder, steps: 1, batchSize: 4 },
      data: memorySource([{ shape: [16, 1, 8, 8], clips: 4 }]),
    })
    await expect(bare.validate()).rejects.toMatchObject({ code: 'ERR_OPTION' })
    await expect(bare.sample(0, folder)).rejects.toMatchObject({ code: 'ERR_OPTION' })
    bare.dispose()
    trainer.dispose()
    model.dispose()
  })
})

// What the VAE of these tests holds all along.
async function vaeBytes(): Promise<number> {
  let bytes = 0
  for (const p of vae.parameters.values()) bytes += p.packed?.bytes ?? p.bytes
  return bytes
}

describe('sample grids', () => {
  const prompts = ['a red circle', 'a blue square']
  const few = { steps: 1, videoSteps: 1, guidanceScale: 2, videoGuidanceScale: 2 }

  test('are the same for the same weights, and leave training and memory as they were', async () => {
    const made = trainerOf({ samples: { prompts, vae, every: 2, ...few } })
    await step(made.trainer, 0)
    const before = await stateOf(made)
    const bytes = await live()
    const dir = join(folder, 'grids')
    const [path] = await made.trainer.sample(12, dir)
    expect(path).toBe(join(dir, 'step-000012.png'))
    const { width, height } = await sharp(path).metadata()
    // Six of the 17 frames of 64 pixels beside each other, two prompts below each other.
    expect(width).toBeGreaterThan(6 * 64)
    expect(height).toBeGreaterThan(2 * 64)
    const first = readFileSync(path!)
    await made.trainer.sample(13, dir)
    expect(readFileSync(join(dir, 'step-000013.png'))).toEqual(first)
    expect(await stateOf(made)).toEqual(before)
    expect(await live()).toBe(bytes)
    await step(made.trainer, 1)
    await made.trainer.sample(14, dir)
    expect(readFileSync(join(dir, 'step-000014.png'))).not.toEqual(first)
    made.dispose()
  })

  test('load a VAE for the time being, and sample networks without history as one unit', async () => {
    const { config } = trainerOf().model
    expect(config.use_temporal_causal).toBe(true)
    const made = trainerOf({
      ...{ temporalPyramid: false, causal: false },
      samples: { prompts: prompts.slice(0, 1), vae: join(folder, 'vae'), ...few },
    })
    const frames: number[] = []
    const causal: unknown[] = []
    const layout = made.model.layoutSteps.bind(made.model)
    made.model.layoutSteps = (inputs) => {
      frames.push(...inputs.columns.flat().map(({ shape }) => shape[2] as number))
      causal.push(inputs.causal)
      return layout(inputs)
    }
    const bytes = await live()
    expect(await made.trainer.sample(1, join(folder, 'whole'))).toHaveLength(1)
    expect(frames).toEqual([3, 3, 3])
    expect(new Set(causal)).toEqual(new Set([false]))
    expect(await live()).toBe(bytes)
    made.dispose()
  })
})

describe('a rehearsal', () => {
  for (const dtype of ['f32', 'bf16'] as const) {
    test(`goes through every branch and changes nothing, in ${dtype}`, async () => {
      const data = memorySource([
        { shape: [16, 4, 8, 8], clips: 8 },
        { shape: [16, 2, 8, 16], clips: 8 },
        { shape: [16, 1, 16, 8], clips: 8 },
      ])
      const make = () =>
        trainerOf({
          ...{ dtype, data, imageRatio: 0.5, images: 'both', validation: held },
          samples: { prompts: ['a red circle'], vae, steps: 1, videoSteps: 1 },
        })
      const made = make()
      await step(made.trainer, 0)
      const before = await stateOf(made)
      const bytes = await live()
      const branches = await made.trainer.rehearse()
      const names = branches.map(({ name }) => name)
      // The batch has one set of samples: videos of two lengths at each of theirs, or images of three sorts.
      expect(names.filter((name) => name.includes('units'))).toEqual([
        '[16,4,8,8] × 4, units [3,3,2]',
        '[16,4,8,8] × 4, units [2,2,3]',
        '[16,4,8,8] × 4, units [1,1,4]',
        '[16,4,8,8] × 4, units [4,4,1]',
        '[16,2,8,16] × 4, units [2,2,2]',
        '[16,2,8,16] × 4, units [1,1,2]',
        '[16,2,8,16] × 4, units [2,2,1]',
        '[16,1,16,8] × 4, units [1,1,1]',
        '[16,4,8,8] × 4, units [3,3,2], without captions',
      ])
      expect(names.filter((name) => name.includes('first frames'))).toHaveLength(2)
      for (const name of ['validation', 'samples', 'checkpoint']) expect(names).toContain(name)
      for (const { name, loss, peak } of branches) {
        if (name.includes('units') || name === 'validation') expect(loss, name).toBeGreaterThan(0)
        expect(peak).toBeGreaterThan(0)
      }
      expect(await stateOf(made)).toEqual(before)
      expect(await live()).toBe(bytes)
      expect(existsSync(join(folder, 'run', 'rehearsal.tmp'))).toBe(false)
      // Training goes on as if nothing had been.
      const other = make()
      await step(other.trainer, 0)
      expect(await step(made.trainer, 1)).toBe(await step(other.trainer, 1))
      made.dispose()
      other.dispose()
    })
  }

  test('names the part that is not finite, and what cannot be written', async () => {
    const made = trainerOf()
    const [, weight] = [...made.model.parameters].find(([name]) => name === 'x_embedder.weight')!
    const good = await weight.floats()
    weight.write(good.map(() => Number.NaN))
    await expect(made.trainer.rehearse()).rejects.toMatchObject({
      code: 'ERR_NUMERICS',
      message: expect.stringMatching(/rehearsal of \[16,3,8,8\] × 4, units .*: loss/),
    })
    weight.write(good)
    const blocked = trainerOf({ out: join(folder, 'vae/config.json/run') })
    await expect(blocked.trainer.rehearse()).rejects.toMatchObject({ code: 'ERR_IO' })
    const stop = new AbortController()
    stop.abort()
    await expect(made.trainer.rehearse({ signal: stop.signal })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    })
    expect((await made.trainer.rehearse()).at(-1)!.name).toBe('checkpoint')
    expect(readdirSync(join(folder, 'run'))).toEqual([])
    made.dispose()
    blocked.dispose()
    await engine.idle()
  })
})

test('what a rehearsal says of memory is what the engine counts', async () => {
  const made = trainerOf({ batchSize: 8 })
  const kept = Tensor.zeros([1000])
  const { peak } = (await made.trainer.rehearse())[0]!
  await engine.idle()
  engine.resetPeak()
  await step(made.trainer, 0)
  await engine.idle()
  expect(Math.abs(engine.memory().peak / peak - 1)).toBeLessThan(0.02)
  kept.dispose()
  made.dispose()
})
