import { describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { PyraflowError } from '../lib/engine/errors.ts'
import type { GenerateEvent, GenerateOptions, Video } from '../lib/index.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { withTinyPipeline } from './fixtures/pipeline.ts'

const [A, B] = ['a red circle', 'a blue square moving left'] as const
let pipe: Pipeline
withTinyPipeline('options', (loaded) => {
  pipe = loaded
})

const make = (options: GenerateOptions): Promise<Video> => pipe.generate(options).result()

async function eventsOf(options: GenerateOptions): Promise<GenerateEvent[]> {
  const events: GenerateEvent[] = []
  for await (const event of pipe.generate(options)) events.push(event)
  return events
}

/** Latents of one latent frame. */
function latentFrame({ latents: { shape, data } }: Video, t: number): Float32Array {
  const [, channels, frames, h, w] = shape
  const area = h * w
  const found = new Float32Array(channels * area)
  for (let c = 0; c < channels; c++)
    found.set(data.subarray((c * frames + t) * area, (c * frames + t + 1) * area), c * area)
  return found
}

describe('a batch', () => {
  test('holds for every prompt and seed what each gives alone, bit for bit', async () => {
    const run = pipe.generate({ prompt: [A, B], videosPerPrompt: 2, seed: 6, frames: 9 })
    const events: GenerateEvent[] = []
    for await (const event of run) events.push(event)
    const videos = await run.results()
    const alone = [
      { prompt: A, seed: 6 },
      { prompt: A, seed: 7 },
      { prompt: B, seed: 6 },
      { prompt: B, seed: 7 },
    ]
    expect(videos.map(({ recipe: { prompt, seed } }) => ({ prompt, seed }))).toEqual(alone)
    for (const [i, options] of alone.entries()) {
      expect(videos[i]!.frames, JSON.stringify(options)).toEqual(
        (await make({ ...options, frames: 9 })).frames,
      )
    }
    // Each video is told of as soon as it is done, and progress counts them all.
    expect(events.flatMap((event) => (event.type === 'video' ? [event.result] : []))).toEqual(videos)
    const progress = events.flatMap((event) => (event.type === 'progress' ? [event] : []))
    expect(progress.map(({ done }) => done)).toEqual(progress.map((_, i) => i + 1))
    expect(new Set(progress.map(({ total }) => total))).toEqual(new Set([progress.length]))
    expect(progress.map(({ video }) => video)).toEqual([0, 1, 2, 3].flatMap((v) => new Array(9).fill(v)))
    expect(progress.at(-1)!.etaMs).toBe(0)
  })

  test('has no single result', async () => {
    const run = pipe.generate({ prompt: A, videosPerPrompt: 2, frames: 1 })
    await expect(run.result()).rejects.toMatchObject({ code: 'ERR_OPTION' })
    expect(await run.results()).toHaveLength(2)
  })

  test('takes no more memory than one video', async () => {
    const peak = async (videosPerPrompt: number): Promise<number> => {
      await engine.idle()
      engine.resetPeak()
      await pipe.generate({ prompt: A, videosPerPrompt, frames: 9 }).results()
      return engine.memory().peak
    }
    const one = await peak(1)
    expect(await peak(3)).toBe(one)
  })
})

describe('guidance', () => {
  const options = { prompt: A, seed: 2, frames: 17 }

  test('given unit by unit equals the scales that mean the same', async () => {
    const scales = await make({ ...options, guidanceScale: 4, videoGuidanceScale: 2 })
    expect((await make({ ...options, guidance: [4, 2] })).frames).toEqual(scales.frames)
    const byFunction = await make({ ...options, guidance: (unit) => (unit === 0 ? 4 : 2) })
    expect(byFunction.frames).toEqual(scales.frames)
    // The function itself is not JSON; its values are.
    expect(byFunction.recipe.guidance).toEqual([4, 2, 2])
    expect((await make(byFunction.recipe)).frames).toEqual(scales.frames)
  })

  test('that falls lowers the scale by alpha a unit, but not below min', async () => {
    const falling = await make({ ...options, guidanceScale: 4, linearGuidance: { alpha: 1.5, min: 2 } })
    expect((await make({ ...options, guidance: [4, 2.5, 2] })).frames).toEqual(falling.frames)
  })

  test('that stops leaves the negative prompt out of the steps after it', async () => {
    const steps = { steps: [1, 2, 3], videoSteps: [1, 2, 3] }
    const all = await make({ ...options, ...steps })
    expect(all.recipe).not.toHaveProperty('guidanceStop')
    expect((await make({ ...options, ...steps, guidanceStop: 1 })).frames).toEqual(all.frames)
    const none = await make({ ...options, ...steps, guidanceScale: 0, videoGuidanceScale: 0 })
    expect((await make({ ...options, ...steps, guidanceStop: 0 })).frames).toEqual(none.frames)
    const half = await make({ ...options, ...steps, guidanceStop: 0.5, historyCache: 2 })
    expect(half.recipe.guidanceStop).toBe(0.5)
    expect(half.frames).not.toEqual(all.frames)
    expect((await make(half.recipe)).frames).toEqual(half.frames)
    const longer = await make({ continueFrom: half, frames: 8 })
    expect(longer.recipe.guidanceStop).toBe(0.5)
    const tokens = (await pipe.plan({ frames: 9, ...steps, guidanceStop: 0.67 })).tokens
    expect(tokens.map((t) => [t.unit, t.stage, t.sequences, t.steps])).toEqual(
      [0, 1].flatMap((unit) => [
        [unit, 0, 2, 1],
        [unit, 1, 2, 2],
        [unit, 2, 2, 1],
        [unit, 2, 1, 2],
      ]),
    )
  })

  test('of 0 leaves the negative prompt out', async () => {
    const unguided = { ...options, guidanceScale: 0, videoGuidanceScale: 0 }
    const video = await make(unguided)
    expect((await make({ ...unguided, negativePrompt: 'blue' })).frames).toEqual(video.frames)
    expect((await make({ ...options, negativePrompt: 'blue' })).frames).not.toEqual(
      (await make(options)).frames,
    )
  })
})

describe('a prompt change', () => {
  test('changes the units that begin at or after its time, and no others', async () => {
    const options = { prompt: A, seed: 2, frames: 25 }
    const [plain, changed] = [
      await make(options),
      // At 8 frames a second units begin at 0, 1/8, 9/8 and 17/8 s.
      await make({ ...options, promptChanges: [{ from: 1.125, prompt: B }] }),
    ]
    for (const t of [0, 1]) expect(latentFrame(changed, t)).toEqual(latentFrame(plain, t))
    for (const t of [2, 3]) expect(latentFrame(changed, t)).not.toEqual(latentFrame(plain, t))
    // A later change, in any order, begins where it should.
    const twice = await make({
      ...options,
      promptChanges: [
        { from: 2, prompt: A },
        { from: 1.1, prompt: B },
      ],
    })
    expect(latentFrame(twice, 2)).toEqual(latentFrame(changed, 2))
    expect(latentFrame(twice, 3)).not.toEqual(latentFrame(changed, 3))
    expect(twice.recipe.promptChanges).toEqual([
      { from: 1.1, prompt: B },
      { from: 2, prompt: A },
    ])
    expect((await make({ ...options, prompt: B, promptChanges: [{ from: 0, prompt: A }] })).frames).toEqual(
      plain.frames,
    )
  })
})

describe('steps', () => {
  test('may be one number for all stages', () => {
    expect(pipe.resolve({ prompt: A, steps: 3, videoSteps: [1, 2, 3] })).toMatchObject({
      steps: [3, 3, 3],
      videoSteps: [1, 2, 3],
    })
  })
})

describe('previews', () => {
  test('show every unit at every lower resolution, and change nothing', async () => {
    const options = { prompt: A, seed: 2, frames: 9 }
    const events = await eventsOf({ ...options, previews: true })
    const previews = events.flatMap((event) => (event.type === 'preview' ? [event] : []))
    expect(
      previews.map(({ unit, stage, width, height, count }) => [unit, stage, width, height, count]),
    ).toEqual([
      [0, 0, 16, 16, 1],
      [0, 1, 32, 32, 1],
      [1, 0, 16, 16, 1],
      [1, 1, 32, 32, 1],
    ])
    for (const { frames, width, height } of previews) expect(frames).toHaveLength(width * height * 3)
    const plain = await eventsOf(options)
    expect(plain.some(({ type }) => type === 'preview')).toBe(false)
    expect(events.filter(({ type }) => type === 'frames')).toEqual(
      plain.filter(({ type }) => type === 'frames'),
    )
  })
})

describe('an image', () => {
  test('is a video of one frame', async () => {
    const image = await make({ prompt: A, frames: 1 })
    expect(image.count).toBe(1)
    expect(latentFrame(image, 0)).toEqual(latentFrame(await make({ prompt: A, frames: 9 }), 0))
  })
})

describe('a prompt', () => {
  test('may be empty, which is what the model was shown without one', async () => {
    const unguided = { frames: 1, guidanceScale: 0 }
    expect((await make({ prompt: '', ...unguided })).count).toBe(1)
  })

  test('that is too long is cut with a warning that says what is lost', async () => {
    const long = 'a red circle moving left a blue square'
    const events = await eventsOf({ prompt: long, frames: 1 })
    expect(events.filter(({ type }) => type === 'warning')).toEqual([
      {
        type: 'warning',
        message: 'The prompt is longer than 5 words; the model does not see "a blue square"',
      },
    ])
  })
})

test('options of the wrong kind, or of no known name, are refused by name', () => {
  const wrong: [object, RegExp][] = [
    [{ prompt: 5 }, /prompt: expected a string or a list of them, received 5/],
    [{ prompt: [] }, /prompt: .*an empty list/],
    [{}, /prompt: .*nothing/],
    [{ prompt: A, promt: 'x' }, /option promt: .*such as prompt/],
    [{ prompt: A, negativePrompt: 1 }, /negativePrompt/],
    [{ prompt: A, promptChanges: [{ from: -1, prompt: A }] }, /promptChanges: .*seconds from 0/],
    [{ prompt: A, videosPerPrompt: 0 }, /videosPerPrompt/],
    [{ prompt: A, width: '64' }, /width: expected a whole number of pixels, received "64"/],
    [{ prompt: A, seconds: 0 }, /seconds/],
    [{ prompt: A, seconds: Number.NaN }, /seconds/],
    [{ prompt: A, seconds: 1, frames: 9 }, /seconds or frames, received both/],
    [{ prompt: A, seconds: 1e9 }, /video length: expected at most \d+ frames \(\d+ s\) of 64×64/],
    [{ prompt: A, frames: 2.5 }, /frames/],
    [{ prompt: A, seed: -1 }, /seed/],
    [{ prompt: A, seed: 1.5 }, /seed/],
    [{ prompt: A, steps: 0 }, /steps/],
    [{ prompt: A, steps: [1, 1] }, /steps: expected 3 whole numbers/],
    [{ prompt: A, steps: 2000 }, /from 1 to 1000/],
    [{ prompt: A, guidanceScale: 'strong' }, /guidanceScale/],
    [{ prompt: A, guidance: [] }, /guidance/],
    [{ prompt: A, guidance: [1], linearGuidance: {} }, /guidance or linearGuidance, received both/],
    [{ prompt: A, linearGuidance: { alpha: 'x' } }, /linearGuidance/],
    [{ prompt: A, guidanceStop: 1.5 }, /guidanceStop: expected a share of the steps, 0 to 1, received 1.5/],
    [{ prompt: A, historyCache: 0 }, /historyCache: expected a whole number of steps from 1/],
    [{ prompt: A, historyWindow: 1.5 }, /historyWindow: expected a whole number of units from 1/],
    [{ prompt: A, signal: {} }, /signal: expected an AbortSignal/],
    [{ prompt: A, width: 128, height: 128 }, /size: expected 64×64, received 128×128.*allowUntrained/],
    [{ prompt: A, width: 100, allowUntrained: true }, /multiples of 64.*nearest size that works is 128×64/],
  ]
  for (const [options, message] of wrong) {
    try {
      pipe.generate(options)
      expect.fail(`${JSON.stringify(options)} was accepted`)
    } catch (error) {
      expect(error).toBeInstanceOf(PyraflowError)
      expect(error).toMatchObject({ code: 'ERR_OPTION', message: expect.stringMatching(message) })
    }
  }
})

test('a size beyond the position table of a network is refused', () => {
  const config = { ...pipe.transformer.config, pos_embed_max_size: 4 }
  const transformer = Object.create(pipe.transformer, { config: { value: config } })
  const small = new Pipeline({ transformer, vae: pipe.vae, text: pipe.text, config: pipe.config })
  expect(small.resolve({ prompt: A }).width).toBe(64)
  expect(() => small.resolve({ prompt: A, width: 128, allowUntrained: true })).toThrow(
    /at most 64 pixels a side, which the position table holds, received 128×64/,
  )
})

test('a guidance function that gives no number is refused before anything is computed', async () => {
  const run = make({ prompt: A, frames: 9, guidance: () => Number.NaN })
  await expect(run).rejects.toMatchObject({ code: 'ERR_OPTION', message: expect.stringMatching(/guidance/) })
})
