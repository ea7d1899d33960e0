import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import sharp from 'sharp'
import { describe, expect, test } from 'vitest'
import type { GenerateOptions, Recipe, Video } from '../lib/index.ts'
import { hasFfmpeg } from '../lib/io/video.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { live } from './fixtures/memory.ts'
import { withTinyPipeline } from './fixtures/pipeline.ts'
import { numbers } from './fixtures/tiny.ts'
import { relativeL2 } from './golden.ts'

const PROMPT = 'a red circle'
let pipe: Pipeline
const folder = withTinyPipeline('continue', (loaded) => {
  pipe = loaded
})

const make = (options: GenerateOptions): Promise<Video> => pipe.generate(options).result()

async function warningsOf(options: GenerateOptions): Promise<string[]> {
  const found: string[] = []
  for await (const event of pipe.generate(options)) if (event.type === 'warning') found.push(event.message)
  return found
}

describe('a continued video', () => {
  const long: GenerateOptions = { prompt: PROMPT, seed: 4, frames: 33 }

  test('equals one that was made in one go, bit for bit, in any number of parts', async () => {
    const whole = await make(long)
    const before = await live()
    const first = await make({ ...long, frames: 9 })
    const second = await make({ continueFrom: first, frames: 16 })
    const third = await make({ continueFrom: second, seconds: 1 })
    expect([first, second, third].map(({ count }) => count)).toEqual([9, 25, 33])
    expect(third.latents).toEqual(whole.latents)
    expect(third.frames).toEqual(whole.frames)
    expect(await live()).toBe(before)
  })

  test('equals one that was made in one go with units of several latent frames, and in bf16', async () => {
    const { transformer, vae, text } = pipe
    const coarse = new Pipeline({ transformer, vae, text, config: { ...pipe.config, framesPerUnit: 2 } })
    const narrow = await Pipeline.load(join(folder, 'model'), { dtype: 'bf16' })
    for (const [pipeline, parts] of [
      [coarse, [17, 16]],
      [narrow, [9, 8]],
    ] as const) {
      const options = { prompt: PROMPT, seed: 4 }
      const whole = await pipeline.generate({ ...options, frames: parts[0] + parts[1] }).result()
      const first = await pipeline.generate({ ...options, frames: parts[0] }).result()
      const both = await pipeline.generate({ continueFrom: first, frames: parts[1] }).result()
      expect(both.frames).toEqual(whole.frames)
    }
    // Lengths are whole units.
    expect(coarse.resolve({ prompt: PROMPT, frames: 2 }).frames).toBe(17)
    narrow.dispose()
  })

  test('can be saved and taken up again from its latents', async () => {
    const first = await make({ ...long, frames: 17 })
    const path = join(folder, 'first.webp')
    await first.save(path, { latents: true })
    const saved = `${path}.latents.safetensors`
    const rest = await make({ prompt: PROMPT, seed: 4, continueFrom: saved, frames: 16 })
    const whole = await make(long)
    expect(rest.frames).toEqual(whole.frames)
    expect(rest.recipe.continueFrom).toBe(saved)
    expect((await make({ ...long, continueFrom: first.latents, frames: 16 })).frames).toEqual(whole.frames)
  })

  test('inherits what is not given anew', async () => {
    const first = await make({
      ...long,
      frames: 9,
      steps: 1,
      negativePrompt: 'blue',
      linearGuidance: { alpha: 1 },
      ...{ historyCache: 2, historyWindow: 3 },
    })
    const inherited = pipe.resolve({ continueFrom: first, frames: 8 })
    expect(inherited).toMatchObject({
      prompt: PROMPT,
      seed: 4,
      steps: [1, 1, 1],
      negativePrompt: 'blue',
      linearGuidance: { alpha: 1, min: 2 },
      ...{ historyCache: 2, historyWindow: 3 },
      frames: 8,
      continueFrom: first.recipe,
    })
    const changed = pipe.resolve({
      continueFrom: first,
      frames: 8,
      prompt: 'a blue square',
      guidanceScale: 1,
    })
    expect(changed).toMatchObject({ prompt: 'a blue square', guidanceScale: 1 })
    expect(changed.linearGuidance).toBeUndefined()
    // Less than a unit is still one.
    expect(pipe.resolve({ continueFrom: first, seconds: 0.1 }).frames).toBe(8)
  })

  test('is made again from its recipe, which remakes what it continued', async () => {
    const first = await make({ ...long, frames: 9 })
    const second = await make({ continueFrom: first, frames: 8, prompt: 'a blue square', seed: 8 })
    expect(second.frames.subarray(0, first.frames.length)).toEqual(first.frames)
    const recipe: Recipe = JSON.parse(JSON.stringify(second.recipe))
    const before = await live()
    const again = await make(recipe)
    expect(again.frames).toEqual(second.frames)
    expect(again.recipe).toEqual(recipe)
    expect(await live()).toBe(before)
  })

  test('takes up frames of a clip: from memory, of pictures, of a video file', async () => {
    const source = await make({ ...long, frames: 9 })
    const options = { prompt: PROMPT, seed: 5, frames: 8 }
    const { frames, width, height } = source
    const fromMemory = await make({ ...options, continueFrom: { frames, width, height } })
    expect(fromMemory.count).toBe(17)
    expect(fromMemory.latents.shape[2]).toBe(3)
    expect(fromMemory.recipe.continueFrom).toMatch(/^sha256:[0-9a-f]{32}$/)
    await source.save(join(folder, 'clip'))
    const fromPictures = await make({ ...options, continueFrom: join(folder, 'clip') })
    expect(fromPictures.frames).toEqual(fromMemory.frames)
    await source.save(join(folder, 'clip.webp'))
    expect((await make({ ...options, continueFrom: join(folder, 'clip.webp') })).count).toBe(17)
    if (!(await hasFfmpeg())) return void console.log('video file: skipped, no ffmpeg')
    await source.save(join(folder, 'clip.mp4'))
    const fromFile = await make({ ...options, continueFrom: join(folder, 'clip.mp4') })
    expect(fromFile.count).toBe(17)
    // The random VAE maps pictures that differ by compression to latents that are not far apart.
    const [a, b] = [fromFile, fromMemory].map(({ latents: { data } }) => data.subarray(0, 128))
    expect(relativeL2(a!, b!)).toBeLessThan(0.5)
  })

  test('leaves out frames at the beginning of a clip that fill no unit, and says so', async () => {
    const { frames, width, height } = await make({ ...long, frames: 17 })
    const options = { prompt: PROMPT, seed: 5, frames: 8 }
    const cut = frames.subarray(5 * width * height * 3)
    const clip = { frames: cut, width, height }
    expect(await warningsOf({ ...options, continueFrom: clip })).toEqual([
      'The clip has 12 frames; its first 3 are left out, since units are 8 frames long',
    ])
    const kept = { ...clip, frames: cut.subarray(3 * width * height * 3) }
    expect((await make({ ...options, continueFrom: clip })).frames).toEqual(
      (await make({ ...options, continueFrom: kept })).frames,
    )
  })

  test('refuses what it cannot continue', async () => {
    const first = await make({ ...long, frames: 1 })
    const wrong: [GenerateOptions['continueFrom'], RegExp, string][] = [
      [{ frames: new Uint8Array(10), width: 64, height: 64 }, /whole RGB frames/, 'ERR_OPTION'],
      [
        { frames: new Uint8Array(32 * 32 * 3), width: 32, height: 32 },
        /frames of 64×64.*32×32/,
        'ERR_OPTION',
      ],
      [{ ...first.latents, data: new Float32Array(3) }, /numbers, received 3/, 'ERR_SHAPE'],
      [{ shape: [1, 4, 1, 8, 8], data: new Float32Array(256) }, /\[1, 16, 1 \+ 1m, 8, 8\]/, 'ERR_OPTION'],
      [join(folder, 'none.mp4'), /none\.mp4/, 'ERR_IO'],
      [join(folder, 'none.safetensors'), /none\.safetensors/, 'ERR_IO'],
      [
        join(folder, 'model/causal_video_vae/diffusion_pytorch_model.safetensors'),
        /'latents'/,
        'ERR_CHECKPOINT',
      ],
    ]
    const before = await live()
    for (const [continueFrom, message, code] of wrong) {
      const run = make({ prompt: PROMPT, frames: 8, continueFrom })
      await expect(run).rejects.toMatchObject({ code, message: expect.stringMatching(message) })
    }
    expect(() => pipe.generate({ continueFrom: first, image: 'a.png' })).toThrow(
      /none when a video is continued/,
    )
    expect(() => pipe.generate({ continueFrom: first.latents })).toThrow(/prompt: expected a string/)
    expect(() => pipe.generate({ prompt: PROMPT, continueFrom: 'sha256:00' })).toThrow(/given again/)
    expect(await live()).toBe(before)
  })
})

describe('a first frame', () => {
  const size = { width: 64, height: 64 }
  const raw = { data: Uint8Array.from(numbers(64 * 64 * 3, 9, 127), (v) => 128 + v), ...size }
  const options: GenerateOptions = { prompt: PROMPT, frames: 9, seed: 3 }

  test('is the same from a path, from the bytes of a picture and from pixels', async () => {
    const path = join(folder, 'first.png')
    await sharp(raw.data, { raw: { ...size, channels: 3 } })
      .png()
      .toFile(path)
    const video = await make({ ...options, image: path })
    expect((await make({ ...options, image: await readFile(path) })).frames).toEqual(video.frames)
    expect((await make({ ...options, image: raw })).frames).toEqual(video.frames)
    expect(video.recipe.image).toBe(path)
  })

  test('of another shape is cropped with a warning, of nearly the same shape without', async () => {
    const blank = (width: number, height: number) => ({
      data: new Uint8Array(width * height * 3),
      width,
      height,
    })
    expect(await warningsOf({ ...options, image: blank(128, 64) })).toEqual([
      'The image is 128×64: 50 % of its width is cut off to make it 64×64',
    ])
    expect(await warningsOf({ ...options, image: blank(60, 100) })).toEqual([
      expect.stringMatching(/40 % of its height/),
    ])
    expect(await warningsOf({ ...options, image: blank(70, 64) })).toEqual([])
  })

  test('given in memory has to be given again with the recipe', async () => {
    const video = await make({ ...options, image: raw })
    expect(video.recipe.image).toMatch(/^sha256:/)
    expect(() => pipe.generate(video.recipe)).toThrow(/image: expected what the recipe was made with/)
    expect((await make({ ...video.recipe, image: raw })).frames).toEqual(video.frames)
  })

  test('that is none, or of which nothing follows, is refused', async () => {
    await expect(make({ ...options, image: Uint8Array.of(1, 2, 3) })).rejects.toMatchObject({
      code: 'ERR_IO',
    })
    await expect(make({ ...options, image: { ...raw, width: 63 } })).rejects.toMatchObject({
      code: 'ERR_SHAPE',
    })
    expect(() => pipe.generate({ ...options, image: raw, frames: 1 })).toThrow(
      /more than the given first frame/,
    )
    expect(() => pipe.generate({ ...options, image: 5 as never })).toThrow(/image: expected a path/)
  })
})
