import { cpSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { type GenerateEvent, type Recipe, readRecipe, type Video } from '../lib/index.ts'
import { hasFfmpeg, probeVideo } from '../lib/io/video.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { tinyDit, tinyText, tinyVae, writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'save-'))
const model = join(folder, 'model')
const PROMPT = 'a red circle'
let pipe: Pipeline
let video: Video

beforeAll(async () => {
  await writePipeline(model)
  pipe = await Pipeline.load(model)
  video = await pipe.generate({ prompt: PROMPT, frames: 9, seed: 5, guidance: [3, 2] }).result()
})
afterAll(() => {
  pipe.dispose()
  rmSync(folder, { recursive: true, force: true })
})

describe('a saved video', () => {
  test('holds its recipe inside the file and beside it, in every format', async () => {
    const ffmpeg = await hasFfmpeg()
    if (!ffmpeg) console.log('mp4 and webm: skipped, no ffmpeg')
    for (const name of ['a.webp', 'a.gif', ...(ffmpeg ? ['a.mp4', 'a.webm'] : [])]) {
      const path = join(folder, name)
      await video.save(path)
      expect(JSON.parse(readFileSync(`${path}.json`, 'utf8')), name).toEqual(video.recipe)
      expect(await readRecipe(path), name).toEqual(video.recipe)
      rmSync(`${path}.json`)
      expect(await readRecipe(path), `${name} alone`).toEqual(video.recipe)
    }
    if (ffmpeg)
      expect(await probeVideo(join(folder, 'a.webm'))).toMatchObject({ width: 64, fps: 8, frames: 9 })
    expect(await sharp(join(folder, 'a.gif'), { animated: true }).metadata()).toMatchObject({ pages: 9 })
    await video.save(join(folder, 'frames'))
    expect(readdirSync(join(folder, 'frames'))).toHaveLength(9)
    expect(await readRecipe(join(folder, 'frames', 'frame-00003.png'))).toEqual(video.recipe)
  })

  test('of one frame is a picture', async () => {
    const path = join(folder, 'one.png')
    const image = await pipe.generate({ prompt: PROMPT, frames: 1 }).result()
    await image.save(path)
    rmSync(`${path}.json`)
    expect(await readRecipe(path)).toEqual(image.recipe)
    expect(new Uint8Array(await sharp(path).raw().toBuffer())).toEqual(image.frames)
  })

  test('keeps a prompt in any script', async () => {
    const prompt = 'a red circle'
    const recipe: Recipe = { ...video.recipe, prompt, negativePrompt: 'ブルー, «größe», 🎈 "q" \\n' }
    const parts = { ...video, recipe }
    const spoken = Object.assign(Object.create(Object.getPrototypeOf(video)) as Video, parts)
    for (const name of ['b.webp', 'b.gif', ...((await hasFfmpeg()) ? ['b.mp4', 'b.webm'] : [])]) {
      const path = join(folder, name)
      await spoken.save(path)
      rmSync(`${path}.json`)
      expect(await readRecipe(path), name).toEqual(recipe)
    }
  })

  test('of a batch is numbered', async () => {
    const run = pipe.generate({ prompt: PROMPT, videosPerPrompt: 2, frames: 1 })
    const paths = [0, 1].map((i) => join(folder, `many-${i}.webp`))
    expect(await run.save(join(folder, 'many.webp'))).toEqual(paths)
    expect((await readRecipe(paths[1]!)).seed).toBe(1)
  })
})

describe('a recipe', () => {
  const warningsOf = async (recipe: Recipe, pipeline = pipe): Promise<string[]> => {
    const events: GenerateEvent[] = []
    for await (const event of pipeline.generate(recipe)) events.push(event)
    return events.flatMap((event) => (event.type === 'warning' ? [event.message] : []))
  }

  test('makes its video again, to the last bit', async () => {
    const again = pipe.generate(JSON.parse(JSON.stringify(video.recipe)))
    expect((await again.result()).frames).toEqual(video.frames)
    expect((await again.result()).recipe).toEqual(video.recipe)
    expect(await warningsOf(video.recipe)).toEqual([])
  })

  test('of another model, type or backend is followed with a warning', async () => {
    expect(
      await warningsOf({ ...video.recipe, frames: 1, model: 'abc', backend: 'cuda', dtype: 'bf16' }),
    ).toEqual([
      expect.stringMatching(/another model \(abc, not [0-9a-f]{32}\)/),
      expect.stringMatching(/other kernels \(cuda, not cpu_/),
      expect.stringMatching(/another compute type \(bf16, not f32\)/),
    ])
  })

  test('is found nowhere in a file of another origin', async () => {
    const path = join(folder, 'plain.png')
    await sharp({ create: { width: 8, height: 8, channels: 3, background: 'red' } })
      .png()
      .toFile(path)
    await expect(readRecipe(path)).rejects.toMatchObject({ code: 'ERR_CHECKPOINT' })
    writeFileSync(join(folder, 'text.webp'), 'text')
    await expect(readRecipe(join(folder, 'text.webp'))).rejects.toMatchObject({ code: 'ERR_IO' })
    await expect(readRecipe(join(folder, 'none.mp4'))).rejects.toMatchObject({ code: 'ERR_IO' })
  })
})

describe('the hash of a model', () => {
  const hashOf = async (change: (dir: string) => void): Promise<string | undefined> => {
    const dir = join(folder, `changed-${Math.random()}`)
    cpSync(model, dir, { recursive: true })
    change(dir)
    const loaded = await Pipeline.load(dir)
    const hash = await loaded.modelHash()
    loaded.dispose()
    return hash
  }

  test('is that of its contents, wherever it lies', async () => {
    expect(await hashOf(() => undefined)).toBe(await pipe.modelHash())
  })

  test('changes with a weight, a setting and a word', async () => {
    const edit = (name: string, change: (bytes: Buffer) => void) => (dir: string) => {
      const bytes = readFileSync(join(dir, name))
      change(bytes)
      writeFileSync(join(dir, name), bytes)
    }
    const changed = [
      await hashOf(
        edit('diffusion_transformer/diffusion_pytorch_model.safetensors', (b) => (b[b.length - 3]! ^= 1)),
      ),
      await hashOf(
        edit('causal_video_vae/diffusion_pytorch_model.safetensors', (b) => (b[b.length - 3]! ^= 1)),
      ),
      await hashOf(edit('pyraflow.json', (b) => b.write('4', b.indexOf('"guidanceScale":3') + 16))),
      await hashOf(edit('text_encoder/config.json', (b) => b.write('rad', b.indexOf('"red"') + 1))),
    ]
    expect(new Set([await pipe.modelHash(), ...changed]).size).toBe(5)
  })

  test('is missing for a pipeline made of parts', async () => {
    const { normalisation } = pipe.config
    const made = new Pipeline({
      transformer: tinyDit(),
      vae: tinyVae(),
      text: tinyText(),
      config: { normalisation, sizes: [[64, 64]], steps: [1, 1, 1] },
    })
    expect(await made.modelHash()).toBeUndefined()
    expect((await made.generate({ prompt: PROMPT, frames: 1 }).result()).recipe.model).toBeUndefined()
    made.dispose()
  })
})
