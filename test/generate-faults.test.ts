import { mkdirSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { PyraflowError } from '../lib/engine/errors.ts'
import { makeStages } from '../lib/flow/stages.ts'
import type { GenerateOptions } from '../lib/index.ts'
import { hasFfmpeg } from '../lib/io/video.ts'
import type { TransformerInputs } from '../lib/models/velocity-network.ts'
import { axpby } from '../lib/ops/pointwise.ts'
import { Pipeline } from '../lib/pipeline.ts'
import type { SampledNetwork } from '../lib/sample/stage-run.ts'
import { sampleLatents, seededNoise } from '../lib/sample.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { atOnce, type Steps } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { disposeFeatures, type TextEncoder } from '../lib/text/encoder.ts'
import { live } from './fixtures/memory.ts'
import { withTinyPipeline } from './fixtures/pipeline.ts'
import { numbers, tinyText } from './fixtures/tiny.ts'

const PROMPT = 'a red circle'
let pipe: Pipeline
const folder = withTinyPipeline('faults', (loaded) => {
  pipe = loaded
})

/** The loaded networks with another text encoder or other constants. */
const variant = (parts: Partial<Pick<Pipeline, 'text' | 'config'>>): Pipeline =>
  new Pipeline({
    transformer: pipe.transformer,
    vae: pipe.vae,
    text: pipe.text,
    config: pipe.config,
    ...parts,
  })

const raw = { data: Uint8Array.from(numbers(64 * 64 * 3, 9, 127), (v) => 128 + v), width: 64, height: 64 }

describe('numbers that are not finite', () => {
  // A network of two layers, the second of which fails from its `failing`th call on.
  function network(failing: number): SampledNetwork {
    let calls = 0
    function* forwardSteps({ columns, capture, timesteps }: TransformerInputs): Steps<Tensor[]> {
      const x = columns[0]!.at(-1)!
      // The call that fails is known by its timestep, so that it fails again when it is run again.
      if (!capture) calls++
      if (!capture && calls === failing) failed = timesteps[0]
      capture?.('layer.0', axpby(x, x, 1, 0))
      yield
      const bad = timesteps[0] === failed
      const y = axpby(x, x, bad ? Number.POSITIVE_INFINITY : 0.5, bad ? Number.NEGATIVE_INFINITY : 0)
      capture?.('layer.1', y)
      return [y]
    }
    let failed: number | undefined
    return {
      latentChannels: 16,
      forwardSteps,
      layoutSteps: () => atOnce(() => undefined),
    } as unknown as SampledNetwork
  }

  const run = async (failing: number): Promise<void> => {
    const text = tinyText().encode([PROMPT])
    const events = sampleLatents(network(failing), {
      stages: makeStages(),
      frames: 2,
      height: 8,
      width: 8,
      text,
      steps: [3, 3, 3],
      videoSteps: [2, 2, 2],
      guidance: { guidanceScale: 0, videoGuidanceScale: 0 },
      noise: seededNoise(new Generator(1)),
    })
    try {
      for await (const event of events) if (event.type === 'unit') event.latent.dispose()
    } finally {
      disposeFeatures(text)
    }
  }

  test('of the network name layer, unit, stage and step, and leave no memory behind', async () => {
    const before = await live()
    for (const [failing, where] of [
      [1, 'unit 0, stage 0, step 0'],
      [5, 'unit 0, stage 1, step 1'],
      [9, 'unit 0, stage 2, step 2'],
      [13, 'unit 1, stage 1, step 1'],
    ] as const) {
      await expect(run(failing), where).rejects.toMatchObject({
        code: 'ERR_NUMERICS',
        message: expect.stringContaining(
          `${where}: expected finite numbers, received NaN or infinity, first in layer.1`,
        ),
      })
      expect(await live(), where).toBe(before)
    }
    await run(100)
    expect(await live()).toBe(before)
  })

  test('of the text name the first layer that sees them', async () => {
    const text = tinyText()
    const broken: TextEncoder = {
      jointDim: text.jointDim,
      pooledDim: text.pooledDim,
      maxLength: text.maxLength,
      encode: (prompts) => {
        const features = text.encode(prompts)
        features.embeds.dispose()
        return { ...features, embeds: Tensor.full([1, 6, 12], Number.NaN) }
      },
    }
    const before = await live()
    await expect(
      variant({ text: broken }).generate({ prompt: PROMPT, frames: 1 }).result(),
    ).rejects.toMatchObject({
      code: 'ERR_NUMERICS',
      message: expect.stringMatching(/unit 0, stage 0, step 0: .*first in context_embedder/),
    })
    expect(await live()).toBe(before)
  })

  test('of the VAE say what was being decoded or encoded, and name the layer', async () => {
    const before = await live()
    const { normalisation } = pipe.config
    const constants = (video: number, image: number) =>
      variant({
        config: {
          ...pipe.config,
          normalisation: {
            image: { ...normalisation.image, scale: image },
            video: { ...normalisation.video, scale: video },
          },
        },
      })
    const cases: [Pipeline, GenerateOptions, RegExp][] = [
      [constants(0, 1), {}, /decoding unit 1: .*first in \S*conv_in/],
      [constants(1, 0), {}, /decoding unit 0: .*first in \S*conv_in/],
      [
        constants(1, Number.POSITIVE_INFINITY),
        { image: raw },
        /encoding the given frames: .*first in the encoder/,
      ],
    ]
    for (const [broken, options, message] of cases) {
      await expect(broken.generate({ prompt: PROMPT, frames: 9, ...options }).result()).rejects.toMatchObject(
        {
          code: 'ERR_NUMERICS',
          message: expect.stringMatching(message),
        },
      )
      expect(await live()).toBe(before)
    }
    expect((await pipe.generate({ prompt: PROMPT, frames: 1 }).result()).count).toBe(1)
  })
})

describe('an abort', () => {
  const soon = 200

  /** Runs `work` with a signal that fires `ms` after its start; how long it then took to end. */
  async function aborted(ms: number, work: (signal: AbortSignal) => Promise<unknown>): Promise<number> {
    const stop = new AbortController()
    let at = performance.now()
    const timer = setTimeout(() => {
      at = performance.now()
      stop.abort(new Error('enough'))
    }, ms)
    try {
      await work(stop.signal)
      return 0
    } catch (error) {
      expect(error).toMatchObject({ code: 'ERR_ABORTED' })
      return performance.now() - at
    } finally {
      clearTimeout(timer)
    }
  }

  test('reaches the text encoder', async () => {
    const text = tinyText()
    const slow: TextEncoder = {
      jointDim: text.jointDim,
      pooledDim: text.pooledDim,
      maxLength: text.maxLength,
      encode: (prompts, { signal } = {}) =>
        new Promise((resolve, reject) => {
          const timer = setTimeout(() => resolve(text.encode(prompts)), 5000)
          signal?.addEventListener('abort', () => {
            clearTimeout(timer)
            reject(new PyraflowError('ERR_ABORTED', { what: 'text encoding was aborted' }))
          })
        }),
    }
    const before = await live()
    const run = (signal: AbortSignal) => variant({ text: slow }).generate({ prompt: PROMPT, signal }).result()
    expect(await aborted(20, run)).toBeLessThan(soon)
    expect(await live()).toBe(before)
  })

  test('ends the encoding of an image or a clip, and whatever else is under way', async () => {
    const before = await live()
    const clip = { frames: new Uint8Array(17 * 64 * 64 * 3), width: 64, height: 64 }
    for (const options of [{ image: raw }, { continueFrom: clip }]) {
      for (const ms of [0, 3, 8, 15, 30, 60]) {
        const took = await aborted(ms, (signal) =>
          pipe.generate({ prompt: PROMPT, frames: 16, previews: true, ...options, signal }).result(),
        )
        expect(took, `${Object.keys(options)} after ${ms} ms`).toBeLessThan(soon)
        expect(await live()).toBe(before)
      }
    }
  })

  test('ends the saving of every format, with nothing under the final name', async () => {
    const video = await pipe.generate({ prompt: PROMPT, frames: 17 }).result()
    const formats = ['a.webp', 'a.gif', 'frames', ...((await hasFfmpeg()) ? ['a.mp4', 'a.webm'] : [])]
    for (const name of formats) {
      const dir = join(folder, `saved-${name}`)
      const path = join(dir, name)
      mkdirSync(dir)
      expect(await aborted(0, (signal) => video.save(path, { signal })), name).toBeLessThan(soon)
      const left = readdirSync(dir)
      // Small clips may be done before the timer fires; then they are whole.
      if (!left.includes(`${name}.json`)) expect(left, name).toEqual([])
      const stop = new AbortController()
      stop.abort()
      await expect(video.save(path, { signal: stop.signal })).rejects.toMatchObject({ code: 'ERR_ABORTED' })
      await video.save(path)
      expect(readdirSync(dir)).toContain(name)
    }
  })
})
