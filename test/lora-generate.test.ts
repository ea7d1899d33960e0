import { createHash } from 'node:crypto'
import { cpSync, existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { beforeAll, describe, expect, test } from 'vitest'
import { readRecipe } from '../lib/generate/recipe.ts'
import type { GenerateEvent, GenerateOptions, Recipe } from '../lib/index.ts'
import { Lora } from '../lib/lora/lora.ts'
import { mergeAdapters } from '../lib/lora/merge.ts'
import { loadVelocityNetwork } from '../lib/models/load-network.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { live } from './fixtures/memory.ts'
import { withTinyPipeline } from './fixtures/pipeline.ts'
import { numbers } from './fixtures/tiny.ts'

let pipe: Pipeline
const folder = withTinyPipeline('lora-generate', (loaded) => {
  pipe = loaded
})
const model = join(folder, 'model')
const one = join(folder, 'one.safetensors')
const two = join(folder, 'two.safetensors')
const OPTIONS = { prompt: 'a red circle', frames: 9, seed: 3 }

beforeAll(async () => {
  const base = await loadVelocityNetwork(join(model, 'diffusion_transformer'), { pack: false })
  for (const [seed, path] of [
    [1, one],
    [2, two],
  ] as const) {
    const lora = Lora.create(base, { rank: 2, seed })
    for (const [i, t] of [...lora.parameters.values()].entries()) t.write(numbers(t.size, 50 * seed + i, 0.4))
    await lora.save(path, { base: await pipe.networkHash() })
    lora.dispose()
  }
  base.dispose()
})

// Arrays of pixels take vitest seconds to compare.
const hashOf = (frames: Uint8Array): string => createHash('sha256').update(frames).digest('hex')

interface Made {
  /** Hash of the frames. */
  frames: string
  pixels: Uint8Array
  recipe: Recipe
  warnings: string[]
}

async function make(pipeline: Pipeline, options: GenerateOptions): Promise<Made> {
  const generation = pipeline.generate(options)
  const events: GenerateEvent[] = []
  for await (const event of generation) events.push(event)
  const { frames, recipe } = await generation.result()
  return {
    frames: hashOf(frames),
    pixels: frames,
    recipe,
    warnings: events.flatMap((e) => (e.type === 'warning' ? [e.message] : [])),
  }
}

/** Mean difference of pixels. */
const difference = (a: Uint8Array, b: Uint8Array): number =>
  a.reduce((n, v, i) => n + Math.abs(v - b[i]!), 0) / a.length

describe('a generation with adapters', () => {
  test('differs from one without, is like that of the merged model, and leaves the next one as it would be', async () => {
    const plain = await make(pipe, OPTIONS)
    const before = await live()
    const adapted = await make(pipe, { ...OPTIONS, adapters: [{ path: one, scale: 0.5 }] })
    expect(await live()).toBe(before)
    expect(difference(adapted.pixels, plain.pixels)).toBeGreaterThan(0.1)
    expect(adapted.warnings).toEqual([])
    expect((await make(pipe, OPTIONS)).frames).toEqual(plain.frames)
    expect((await make(pipe, { ...OPTIONS, adapters: [{ path: one, scale: 0 }] })).frames).toEqual(
      plain.frames,
    )
    expect((await make(pipe, { ...OPTIONS, adapters: [] })).frames).toEqual(plain.frames)

    const merged = join(folder, 'merged')
    await mergeAdapters(model, [{ path: one, scale: 0.5 }], merged)
    const other = await Pipeline.load(merged)
    expect(difference((await make(other, OPTIONS)).pixels, adapted.pixels)).toBeLessThan(0.02)
    other.dispose()
  })

  test('may run beside others with other adapters on the same weights', async () => {
    const cases = [
      [],
      [{ path: one }],
      [{ path: two, scale: 0.3 }],
      [{ path: one, scale: 0.2 }, { path: two }],
    ]
    const alone: string[] = []
    for (const adapters of cases) alone.push((await make(pipe, { ...OPTIONS, adapters })).frames)
    const together = await Promise.all(cases.map((adapters) => make(pipe, { ...OPTIONS, adapters })))
    expect(together.map(({ frames }) => frames)).toEqual(alone)
    expect(new Set(alone).size).toBe(4)
  })

  test('names them in its recipe, which makes the video again, also as what is continued', async () => {
    const { recipe, frames, pixels } = await make(pipe, {
      ...OPTIONS,
      adapters: [{ path: one, scale: 0.5 }, { path: two }],
    })
    expect(recipe.adapters).toEqual([
      { path: one, scale: 0.5, hash: expect.stringMatching(/^[0-9a-f]{32}$/) },
      { path: two, scale: 1, hash: expect.stringMatching(/^[0-9a-f]{32}$/) },
    ])
    const generation = pipe.generate({ ...OPTIONS, adapters: recipe.adapters })
    await generation.save(join(folder, 'video.webp'))
    const read = await readRecipe(join(folder, 'video.webp'))
    expect(read.adapters).toEqual(recipe.adapters)
    expect((await make(pipe, read)).frames).toEqual(frames)

    const longer = await make(pipe, { continueFrom: recipe, frames: 8 })
    const whole = await make(pipe, { ...OPTIONS, frames: 17, adapters: recipe.adapters })
    expect(longer.recipe.adapters).toEqual(recipe.adapters)
    expect(longer.frames).toEqual(whole.frames)
    // The adapters of a video that is continued need not be those of its continuation.
    const other = await make(pipe, { continueFrom: recipe, frames: 8, adapters: [] })
    expect(other.recipe.adapters).toBeUndefined()
    expect(hashOf(other.pixels.subarray(0, pixels.length))).toBe(frames)
    expect(other.frames).not.toEqual(whole.frames)
  })

  test('takes those of its pipeline unless it, or the recipe that it repeats, says otherwise', async () => {
    const plain = await make(pipe, OPTIONS)
    const own = await Pipeline.load(model, { adapters: [{ path: one }] })
    const adapted = await make(own, OPTIONS)
    expect(adapted.recipe.adapters).toMatchObject([{ path: one, scale: 1 }])
    expect(adapted.frames).toEqual((await make(pipe, { ...OPTIONS, adapters: [{ path: one }] })).frames)
    expect((await make(own, { ...OPTIONS, adapters: [] })).frames).toEqual(plain.frames)
    expect((await make(own, plain.recipe)).frames).toEqual(plain.frames)
    own.dispose()
  })

  test('is told when an adapter was trained on other weights, or is not the one of the recipe', async () => {
    const other = join(folder, 'other')
    cpSync(model, other, { recursive: true })
    const config = join(other, 'diffusion_transformer', 'config.json')
    writeFileSync(config, `${readFileSync(config, 'utf8')}\n`)
    const elsewhere = await Pipeline.load(other)
    const { recipe, warnings } = await make(elsewhere, { ...OPTIONS, adapters: [{ path: one }] })
    expect(warnings).toEqual([expect.stringMatching(/one\.safetensors was trained on other weights/)])
    elsewhere.dispose()
    const moved = { ...recipe, adapters: recipe.adapters!.map((adapter) => ({ ...adapter, path: two })) }
    const repeated = await make(pipe, moved)
    expect(repeated.warnings).toContainEqual(
      expect.stringMatching(/made with another adapter .*two\.safetensors/),
    )
  })

  test('fails where an adapter does, with nothing left behind, and the next one works', async () => {
    const before = await live()
    const gone = join(folder, 'gone.safetensors')
    await expect(make(pipe, { ...OPTIONS, adapters: [{ path: gone }] })).rejects.toMatchObject({
      code: 'ERR_IO',
    })
    await expect(Pipeline.load(model, { adapters: [{ path: gone }] })).rejects.toMatchObject({
      code: 'ERR_IO',
    })
    const wrong = [{ path: 3 }, 'one.safetensors', [{ scale: 1 }], [{ path: one, scale: 'all' }]]
    for (const adapters of wrong) {
      expect(() => pipe.generate({ ...OPTIONS, adapters: adapters as never })).toThrow(
        /adapters: expected a list of \{ path, scale \}/,
      )
    }
    await expect(Pipeline.load(model, { adapters: [{}] as never })).rejects.toMatchObject({
      code: 'ERR_OPTION',
    })
    cpSync(one, gone)
    const own = await Pipeline.load(model, { adapters: [{ path: gone }] })
    rmSync(gone)
    await expect(make(own, OPTIONS)).rejects.toMatchObject({ code: 'ERR_IO' })
    expect((await make(own, { ...OPTIONS, adapters: [] })).pixels.length).toBeGreaterThan(0)
    own.dispose()
    expect(await live()).toBe(before)
    expect(existsSync(gone)).toBe(false)
  })
})
