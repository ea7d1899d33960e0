import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { coupleCoefficients } from '../lib/flow/couple.ts'
import { jumpCoefficients } from '../lib/flow/jump.ts'
import { makeStages, stageSteps } from '../lib/flow/stages.ts'
import type { GenerateEvent } from '../lib/generate/generation.ts'
import type { TransformerInputs, VelocityNetwork } from '../lib/models/velocity-network.ts'
import { euler } from '../lib/ops/euler.ts'
import { axpby } from '../lib/ops/pointwise.ts'
import { renoise } from '../lib/ops/renoise.ts'
import { upsample } from '../lib/ops/upsample.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { sampleLatents, seededNoise } from '../lib/sample.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { atOnce, type Steps } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { runChild } from './fixtures/compiled.ts'
import { live } from './fixtures/memory.ts'
import { numbers, tinyText, writePipeline } from './fixtures/tiny.ts'
import { relativeL2 } from './golden.ts'

const folder = mkdtempSync(join(tmpdir(), 'generate-'))
const model = join(folder, 'model')
const PROMPT = 'a red circle'
let pipe: Pipeline

beforeAll(async () => {
  await writePipeline(model)
  pipe = await Pipeline.load(model)
})
afterAll(() => {
  pipe.dispose()
  rmSync(folder, { recursive: true, force: true })
})

describe('a generation', () => {
  test('is the same to the last bit for any number of threads, and so is every op', async () => {
    const run = (threads: string): Promise<string[]> =>
      runChild('child-generate', [model], { env: { PYRAFLOW_THREADS: threads } })
    const one = await run('1')
    expect(one.length).toBeGreaterThan(80)
    for (const threads of ['2', '3']) {
      const more = await run(threads)
      const different = one.filter((line, i) => line !== more[i]).map((line) => line.split(' ')[0])
      expect(different, `differ between 1 and ${threads} threads`).toEqual([])
    }
  })

  test('depends on its seed and its prompt alone', async () => {
    const frames = async (options: { seed: number; prompt?: string }): Promise<Uint8Array> =>
      (await pipe.generate({ prompt: PROMPT, frames: 9, ...options }).result()).frames
    const first = await frames({ seed: 1 })
    expect(await frames({ seed: 1 })).toEqual(first)
    expect(await frames({ seed: 2 })).not.toEqual(first)
    expect(await frames({ seed: 1, prompt: 'a blue square' })).not.toEqual(first)
  })

  test('tells of every step in order, gives the frames of each unit when it is done, and frees all it made', async () => {
    const before = await live()
    const events: GenerateEvent[] = []
    const run = pipe.generate({ prompt: PROMPT, frames: 17, seed: 3 })
    for await (const event of run) events.push(event)
    const progress = events.flatMap((event) => (event.type === 'progress' ? [event] : []))
    // Unit 0 takes 2 steps in each of 3 stages, units 1 and 2 one.
    const order = [0, 1, 2].flatMap((unit) =>
      [0, 1, 2].flatMap((stage) =>
        unit
          ? [[unit, stage]]
          : [
              [unit, stage],
              [unit, stage],
            ],
      ),
    )
    expect(progress.map(({ unit, stage }) => [unit, stage])).toEqual(order)
    expect(progress.map(({ done }) => done)).toEqual(order.map((_, i) => i + 1))
    expect(progress.every(({ total, etaMs }) => total === order.length && etaMs >= 0)).toBe(true)
    expect(progress.at(-1)!.etaMs).toBe(0)
    const frames = events.flatMap((event) => (event.type === 'frames' ? [event] : []))
    // After the last step of each unit, before the first of the next.
    expect(frames.map((event) => events.indexOf(event))).toEqual([6, 10, 14])
    expect(frames.map(({ first, count }) => [first, count])).toEqual([
      [0, 1],
      [1, 8],
      [9, 8],
    ])
    const video = await run.result()
    expect(Buffer.concat(frames.map((event) => event.frames)).equals(video.frames)).toBe(true)
    expect(video).toMatchObject({ count: 17, width: 64, height: 64, fps: 8 })
    expect(video.frames).toHaveLength(17 * 64 * 64 * 3)
    expect(await live()).toBe(before)
  })

  test('continues from a picture', async () => {
    const image = join(folder, 'first.png')
    const pixels = Uint8Array.from(numbers(80 * 100 * 3, 9, 127), (v) => 128 + v)
    await sharp(pixels, { raw: { width: 100, height: 80, channels: 3 } })
      .png()
      .toFile(image)
    const before = await live()
    const events: GenerateEvent[] = []
    const run = pipe.generate({ prompt: PROMPT, image, frames: 17, seed: 3 })
    for await (const event of run) events.push(event)
    const progress = events.flatMap((event) => (event.type === 'progress' ? [event] : []))
    expect([...new Set(progress.map(({ unit }) => unit))]).toEqual([1, 2])
    expect(progress).toHaveLength(2 * 3)
    const video = await run.result()
    expect(video.count).toBe(17)
    expect(video.recipe.image).toBe(image)
    expect(video.frames).not.toEqual(
      (await pipe.generate({ prompt: PROMPT, frames: 17, seed: 3 }).result()).frames,
    )
    expect(await live()).toBe(before)
    await expect(
      pipe.generate({ prompt: PROMPT, image: join(folder, 'none.png') }).result(),
    ).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringContaining('none.png'),
    })
    expect(await live()).toBe(before)
  })

  test('takes its length as seconds or as frames, rounded to whole latent frames', () => {
    const frames = (options: { seconds?: number; frames?: number }): number =>
      pipe.resolve({ prompt: '', ...options }).frames
    expect(frames({})).toBe(9)
    expect(frames({ seconds: 2 })).toBe(17)
    expect(frames({ seconds: 0.1 })).toBe(1)
    expect(frames({ frames: 1 })).toBe(1)
    expect(frames({ frames: 2 })).toBe(9)
    expect(frames({ frames: 17 })).toBe(17)
    for (const wrong of [{ seconds: 0 }, { seconds: -1 }, { frames: 2.5 }, { seconds: Number.NaN }]) {
      expect(() => frames(wrong)).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
    }
  })

  test('saves a webp and, beside it, the recipe that makes it again', async () => {
    const path = join(folder, 'out', 'clip.webp')
    const run = pipe.generate({ prompt: PROMPT, negativePrompt: 'blue', frames: 9, seed: 5 })
    expect(await run.save(path)).toEqual([path])
    const video = await run.result()
    const recipe = JSON.parse(readFileSync(`${path}.json`, 'utf8'))
    expect(recipe).toEqual({
      prompt: PROMPT,
      negativePrompt: 'blue',
      width: 64,
      height: 64,
      frames: 9,
      fps: 8,
      seed: 5,
      steps: [2, 2, 2],
      videoSteps: [1, 1, 1],
      guidanceScale: 3,
      videoGuidanceScale: 2,
      dtype: 'f32',
      model: await pipe.modelHash(),
      backend: engine.device.backend,
    })
    expect(await sharp(path, { animated: true }).metadata()).toMatchObject({
      width: 64,
      pages: 9,
      pageHeight: 64,
    })
    expect((await pipe.generate(recipe).result()).frames).toEqual(video.frames)
  })

  test('refuses options that do not fit, before anything runs', async () => {
    const wrong: [object, RegExp][] = [
      [{ width: 128, height: 128 }, /size: expected 64×64, received 128×128.*allowUntrained/],
      [{ steps: [1, 1] }, /steps: expected 3/],
      [{ videoSteps: [1, 0, 1] }, /videoSteps/],
      [{ prompt: undefined }, /prompt/],
      [{ maxMemory: -1 }, /maxMemory: expected a positive number/],
      [{ width: 72, allowUntrained: true }, /multiples of 64, received 72×64\. The nearest size .* 64×64/],
    ]
    for (const [options, message] of wrong) {
      expect(() => pipe.generate({ prompt: PROMPT, ...options })).toThrow(
        expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringMatching(message) }),
      )
    }
    const before = await live()
    await expect(pipe.generate({ prompt: 'a green circle' }).result()).rejects.toMatchObject({
      code: 'ERR_OPTION',
    })
    await expect(pipe.generate({ prompt: PROMPT, frames: 1, maxMemory: 1 }).result()).rejects.toMatchObject({
      code: 'ERR_MEMORY',
    })
    const other = await pipe
      .generate({ prompt: PROMPT, width: 128, height: 64, frames: 1, allowUntrained: true })
      .result()
    expect(other.frames).toHaveLength(128 * 64 * 3)
    expect(await live()).toBe(before)
  })

  test('ends within 200 ms of an abort, wherever it is, and leaves no memory behind', async () => {
    const before = await live()
    for (const at of [0, 1, 4, 9]) {
      const stop = new AbortController()
      if (at === 0) stop.abort()
      let done = 0
      let aborted = performance.now()
      const run = async (): Promise<void> => {
        for await (const event of pipe.generate({ prompt: PROMPT, frames: 9, signal: stop.signal })) {
          if (event.type === 'progress' && ++done === at) {
            const abort = (): void => {
              aborted = performance.now()
              stop.abort(new Error('enough'))
            }
            // While the engine is at work. After the last step frames are decoded, which may take less than a timer.
            if (at === 9) setImmediate(abort)
            else setTimeout(abort, at % 2)
          }
        }
      }
      await expect(run()).rejects.toMatchObject({ code: 'ERR_ABORTED' })
      expect(performance.now() - aborted, `after step ${at}`).toBeLessThan(200)
      expect(await live(), `after step ${at}`).toBe(before)
    }
    expect((await pipe.generate({ prompt: PROMPT, frames: 1 }).result()).count).toBe(1)
  })

  test('may be left early by its reader', async () => {
    const before = await live()
    for await (const event of pipe.generate({ prompt: PROMPT, frames: 9 })) {
      if (event.type === 'progress' && event.done === 3) break
    }
    expect(await live()).toBe(before)
  })
})

describe('the flow', () => {
  const stages = makeStages()

  test('lands exactly on the end of a stage with an oracle, in any number of steps', async () => {
    const generator = new Generator(1)
    for (let k = 0; k < 3; k++) {
      const q = coupleCoefficients(stages, k)
      const [noise, data, low] = [
        [1, 4, 2, 8, 8],
        [1, 4, 2, 8, 8],
        [1, 4, 2, 4, 4],
      ].map((s) => keep(generator.normal(s)))
      const start = keep(
        scope(() =>
          k === 0 ? noise!.view(noise!.shape) : axpby(noise!, upsample(low!), q.startNoise, q.startData),
        ),
      )
      const end = keep(axpby(noise!, data!, q.endNoise, q.endData))
      const velocity = keep(axpby(start, end, 1, -1)) // (17)
      for (const steps of [1, 2, 7, 20]) {
        const { sigmas } = stageSteps(stages, k, steps)
        const x = scope(() => {
          let latent = start
          for (let n = 0; n < steps; n++) {
            latent = euler(latent, velocity, null, { deltaSigma: sigmas[n + 1]! - sigmas[n]!, guidance: 1 }) // (28)
          }
          return latent
        })
        expect(relativeL2(await x.floats(), await end.floats()), `stage ${k}, ${steps} steps`).toBeLessThan(
          1e-6,
        )
      }
    }
  })

  test('jumps to where the next stage begins: mean and 2×2 covariance', async () => {
    const side = 512
    for (const k of [1, 2]) {
      const low = 0.7
      const before = coupleCoefficients(stages, k - 1)
      const { alpha, beta, gamma } = jumpCoefficients(stages, k)
      const x = scope(() => {
        const noise = new Generator(k).normal([side, side])
        const end = axpby(noise, Tensor.full([side, side], low), before.endNoise, before.endData) // (15)
        return renoise(end, { alpha, beta, gamma, seed: 9, stream: k }) // (20)
      })
      const values = await x.floats()
      const after = coupleCoefficients(stages, k)
      const covariance = Array.from({ length: 16 }, () => 0)
      let total = 0
      const width = 2 * side
      for (let y = 0; y < width; y += 2) {
        for (let c = 0; c < width; c += 2) {
          const block = [0, 1, width, width + 1].map(
            (o) => values[y * width + c + o]! - after.startData * low,
          )
          for (let i = 0; i < 4; i++) {
            total += block[i]!
            for (let j = 0; j < 4; j++) covariance[4 * i + j]! += block[i]! * block[j]!
          }
        }
      }
      const blocks = side * side
      expect(Math.abs(total / (4 * blocks))).toBeLessThan(0.01)
      const variance = after.startNoise ** 2
      covariance.forEach((sum, at) => {
        const expected = at % 5 === 0 ? variance : 0
        expect(Math.abs(sum / blocks - expected) / variance, `stage ${k}, entry ${at}`).toBeLessThan(0.01)
      })
    }
  })

  // A network that knows the answer: it remembers where each stage began and points from there to `target`.
  function oracle(target: (shape: readonly number[]) => Tensor): VelocityNetwork {
    let start: Tensor | undefined
    function* forwardSteps({ columns }: TransformerInputs): Steps<Tensor[]> {
      yield
      const x = columns[0]!.at(-1)!
      if (!start || start.shape.join() !== x.shape.join()) start = keep(axpby(x, x, 1, 0))
      return [axpby(start, target(x.shape), 1, -1)]
    }
    return {
      latentChannels: 16,
      forwardSteps,
      layoutSteps: () => atOnce(() => undefined as never),
    } as unknown as VelocityNetwork
  }

  test('sampled with an oracle ends each stage on the target, with guidance and without', async () => {
    const text = tinyText().encode([PROMPT])
    for (const guided of [true, false]) {
      const found: number[] = []
      for await (const event of sampleLatents(
        oracle((shape) => Tensor.full(shape, 0.25)),
        {
          stages,
          frames: 1,
          height: 8,
          width: 8,
          text,
          negative: guided ? tinyText().encode(['']) : undefined,
          steps: [3, 2, 1],
          videoSteps: [1, 1, 1],
          guidance: { guidanceScale: 4, videoGuidanceScale: 2 },
          noise: seededNoise(new Generator(1)),
        },
      )) {
        if (event.type !== 'stage') continue
        const values = await event.latent.floats()
        found.push(event.latent.shape[4] as number)
        expect(relativeL2(values, new Float32Array(values.length).fill(0.25))).toBeLessThan(1e-5)
      }
      expect(found).toEqual([2, 4, 8])
    }
  })

  test('refuses given frames for a network without history', async () => {
    const events = sampleLatents(
      oracle((shape) => Tensor.full(shape, 0)),
      {
        ...{ stages, frames: 3, height: 8, width: 8, text: tinyText().encode([PROMPT]) },
        ...{ steps: [1, 1, 1], videoSteps: [1, 1, 1], noise: seededNoise(new Generator(1)) },
        guidance: { guidanceScale: 1, videoGuidanceScale: 1 },
        given: Tensor.zeros([1, 16, 1, 8, 8]),
        fullSequence: true,
      },
    )
    await expect(events.next()).rejects.toMatchObject({
      code: 'ERR_OPTION',
      message: expect.stringMatching(/given.*fullSequence/),
    })
  })
})
