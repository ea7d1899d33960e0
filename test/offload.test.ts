import { cpSync, mkdtempSync, rmSync, truncateSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { openSafetensors, writeSafetensors } from '../lib/io/safetensors.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { PyramidDiffusionMMDiT } from '../lib/models/dit-mmdit.ts'
import type { Offload } from '../lib/nn/offload.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { planFolder } from '../lib/plan-folder.ts'
import { sizeOf, Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { numbers, writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'offload-'))
const flux = join(folder, 'flux')
const sd3 = join(folder, 'sd3')
const OPTIONS = { prompt: 'a red circle', frames: 9, seed: 3 }

// Wide enough that the transformer outweighs everything else.
const sizes = {
  num_attention_heads: 8,
  attention_head_dim: 32,
  joint_attention_dim: 12,
  pooled_projection_dim: 12,
}

beforeAll(async () => {
  const form = { ...sizes, num_layers: 1, num_single_layers: 2, axes_dims_rope: [8, 12, 12] as const }
  await writePipeline(
    flux,
    PyramidFluxTransformer.create({ ...form, axes_dims_rope: [8, 12, 12] }, { seed: 1 }),
  )
  await writePipeline(sd3, PyramidDiffusionMMDiT.create({ ...sizes, num_layers: 2 }, { seed: 1 }))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** A limit that a video fits only while the transformer's matrices are away. */
async function tight(
  dir: string,
  dtype: 'f32' | 'bf16' = 'f32',
): Promise<{ limit: number; matrices: number }> {
  const roomy = await Pipeline.load(dir, { dtype, maxMemory: 2 ** 40 })
  const plan = await roomy.plan(OPTIONS)
  const matrices = offloadOf(roomy).bytes
  expect([plan.offloaded, offloadOf(roomy).absent]).toEqual([0, false])
  roomy.dispose()
  return { limit: Math.round(plan.bytes.peak - 0.6 * matrices), matrices }
}

const offloadOf = ({ transformer }: Pipeline): Offload => transformer.offload as Offload

const framesOf = async (pipe: Pipeline, options = OPTIONS): Promise<Uint8Array> =>
  (await pipe.generate(options).result()).frames

describe('weights beyond a limit', () => {
  for (const [name, dir, dtype] of [
    ['flux in f32', flux, 'f32'],
    ['flux in bf16', flux, 'bf16'],
    ['the SD3 variant in bf16', sd3, 'bf16'],
  ] as const) {
    test(`are read again for every step, to the same bits: ${name}`, async () => {
      const before = await live()
      const free = await Pipeline.load(dir, { dtype })
      expect(free.transformer.offload).toBeNull()
      const expected = await framesOf(free)
      free.dispose()

      const { limit, matrices } = await tight(dir, dtype)
      const pipe = await Pipeline.load(dir, { dtype, maxMemory: limit })
      const weights = (await live()) - before
      const plan = await pipe.plan(OPTIONS)
      expect(plan.offloaded).toBe(matrices)
      expect(plan.bytes.peak).toBeLessThanOrEqual(limit)
      expect(await planFolder(dir, { ...OPTIONS, dtype, maxMemory: limit })).toEqual(plan)
      await engine.idle()
      engine.resetPeak()
      const warnings: string[] = []
      const generation = pipe.generate(OPTIONS)
      for await (const event of generation) if (event.type === 'warning') warnings.push(event.message)
      expect((await generation.result()).frames).toEqual(expected)
      expect(warnings).toEqual([expect.stringMatching(/read again for every step/)])
      const { denoise, decode, text } = plan.bytes
      const planned = weights + Math.max(denoise, decode, text)
      const peak = engine.memory().peak - before
      expect(peak / planned, `planned ${planned}, measured ${peak}`).toBeGreaterThan(0.9)
      expect(peak / planned, `planned ${planned}, measured ${peak}`).toBeLessThan(1.02)
      pipe.dispose()
      expect(await live()).toBe(before)
    })
  }

  test('come back for a video that fits beside them', async () => {
    const { limit, matrices } = await tight(flux)
    const pipe = await Pipeline.load(flux, { maxMemory: limit })
    expect(offloadOf(pipe).absent, 'they do not fit beside the VAE').toBe(true)
    const away = await live()
    await framesOf(pipe)
    expect(await live()).toBe(away)
    pipe.dispose()

    const image = { ...OPTIONS, frames: 1 }
    const large = { ...OPTIONS, width: 128, height: 64, frames: 9, allowUntrained: true }
    const roomy = await Pipeline.load(flux, { maxMemory: 2 ** 40 })
    const { transformer, vae } = (await roomy.plan(image)).bytes.weights
    roomy.dispose()
    const both = await Pipeline.load(flux, { maxMemory: transformer + vae + 8e6 })
    expect(offloadOf(both).absent).toBe(false)
    const there = await live()
    const picture = await framesOf(both, image)
    const warned = async (options: typeof OPTIONS): Promise<number> => {
      let warnings = 0
      for await (const { type } of both.generate(options)) if (type === 'warning') warnings++
      return warnings
    }
    expect(await warned(large)).toBe(1)
    expect([offloadOf(both).absent, there - (await live())]).toEqual([true, matrices])
    expect(await warned(image)).toBe(0)
    expect([offloadOf(both).absent, await live()]).toEqual([false, there])
    expect(await framesOf(both, image)).toEqual(picture)
    both.dispose()
  })

  test('stay away while somebody wants it, however often he says that he does not', async () => {
    const { limit } = await tight(flux)
    const pipe = await Pipeline.load(flux, { maxMemory: limit })
    const offload = offloadOf(pipe)
    await offload.restore()
    expect(offload.absent).toBe(false)
    const [one, two] = [offload.begin(), offload.begin()]
    one()
    one()
    await offload.restore()
    expect(offload.absent).toBe(true)
    two()
    await offload.restore()
    expect(offload.absent).toBe(false)
    pipe.dispose()
  })

  test('may differ between generations that run at once', async () => {
    const { limit } = await tight(flux)
    const pipe = await Pipeline.load(flux, { maxMemory: limit })
    const expected = await framesOf(pipe)
    await offloadOf(pipe).restore()
    const stop = offloadOf(pipe).begin()
    const [a, b] = await Promise.all([framesOf(pipe), framesOf(pipe)])
    expect([a, b]).toEqual([expected, expected])
    const late = framesOf(pipe)
    stop()
    await Promise.all([offloadOf(pipe).restore(), late])
    expect(await late).toEqual(expected)
    pipe.dispose()
  })

  test('serve adapters, and are saved as they are in the file', async () => {
    const { limit } = await tight(flux)
    const [free, pipe] = [await Pipeline.load(flux), await Pipeline.load(flux, { maxMemory: limit })]
    const tensors: Tensor[] = []
    const made = (shape: readonly number[], seed: number, size = 1): Tensor => {
      const tensor = Tensor.from(numbers(sizeOf(shape), seed, size), shape)
      tensors.push(tensor)
      return tensor
    }
    const adapters = new Map([
      [
        'transformer_blocks.0.attn.to_q',
        { a: made([4, 256], 1, 0.1), b: made([256, 4], 2, 0.1), scale: 0.5 },
      ],
      [
        'single_transformer_blocks.1.proj_mlp',
        { a: made([4, 256], 3, 0.1), b: made([1024, 4], 4, 0.1), scale: 1 },
      ],
    ])
    const inputs = {
      columns: [[made([1, 16, 1, 8, 8], 5)]],
      timesteps: [500],
      text: made([1, 6, 12], 6),
      pooled: made([1, 12], 7),
    }
    const [plain, adapted, away] = [
      free.transformer.forward(inputs),
      free.transformer.adapted(adapters).forward(inputs),
      pipe.transformer.adapted(adapters).forward(inputs),
    ].map(([v]) => v as Tensor) as [Tensor, Tensor, Tensor]
    expect(await away.floats()).toEqual(await adapted.floats())
    expect(await away.floats()).not.toEqual(await plain.floats())

    const saved = join(folder, 'saved')
    await pipe.transformer.save(saved)
    const file = (dir: string) => openSafetensors(join(dir, 'diffusion_pytorch_model.safetensors'))
    const [before, after] = [file(join(flux, 'diffusion_transformer')), file(saved)]
    expect([...after.entries.keys()].sort()).toEqual([...before.entries.keys()].sort())
    for (const name of before.entries.keys()) {
      const [a, b] = [before, after].map((f) => Buffer.from(f.readArray(name).buffer)) as [Buffer, Buffer]
      expect([name, a.equals(b)]).toEqual([name, true])
    }
    for (const x of [free, pipe, plain, adapted, away, ...tensors]) x.dispose()
  })

  test('are looked at when they are loaded', async () => {
    const { limit } = await tight(flux)
    const dir = join(folder, 'nan')
    cpSync(flux, dir, { recursive: true })
    const path = join(dir, 'diffusion_transformer', 'diffusion_pytorch_model.safetensors')
    const file = openSafetensors(path)
    const bad = 'transformer_blocks.0.ff.net.2.weight'
    const tensors = [...file.entries].map(([name, { dtype, shape }]) => {
      const data = file.readArray(name) as Float32Array<ArrayBuffer>
      if (name === bad) data[7] = Number.NaN
      return { name, dtype, shape, data }
    })
    await writeSafetensors(path, tensors)
    const before = await live()
    await expect(Pipeline.load(dir, { maxMemory: limit })).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining(bad),
    })
    expect(await live()).toBe(before)
  })

  test('survive an abort, and a file that is cut off meanwhile', async () => {
    const { limit } = await tight(flux)
    const dir = join(folder, 'cut')
    cpSync(flux, dir, { recursive: true })
    const pipe = await Pipeline.load(dir, { maxMemory: limit })
    const away = await live()
    const expected = await framesOf(pipe)
    const abort = new AbortController()
    const generation = pipe.generate({ ...OPTIONS, signal: abort.signal })
    const stopped = (async () => {
      for await (const event of generation) if (event.type === 'progress') abort.abort()
    })()
    await expect(stopped).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    expect(await live()).toBe(away)
    const early = AbortSignal.abort()
    await expect(offloadOf(pipe).restore(early)).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    const later = new AbortController()
    const restored = offloadOf(pipe).restore(later.signal)
    setImmediate(() => later.abort())
    await expect(restored).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    expect([offloadOf(pipe).absent, await live()]).toEqual([true, away])
    expect(await framesOf(pipe)).toEqual(expected)

    truncateSync(join(dir, 'diffusion_transformer', 'diffusion_pytorch_model.safetensors'), 4096)
    await expect(framesOf(pipe)).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/ended early/),
    })
    await expect(offloadOf(pipe).restore()).rejects.toMatchObject({ code: 'ERR_IO' })
    expect([offloadOf(pipe).absent, await live()]).toEqual([true, away])
    pipe.dispose()
    const whole = await Pipeline.load(flux, { maxMemory: limit })
    expect(await framesOf(whole)).toEqual(expected)
    whole.dispose()
  })
})
