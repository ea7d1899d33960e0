import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { scoreClip } from '../examples/shapes/scorer.ts'
import { engine } from '../lib/engine/engine.ts'
import { relativeL2 } from '../lib/golden/compare.ts'
import { createVelocityNetwork } from '../lib/models/load-network.ts'
import { PastKeys } from '../lib/models/past-keys.ts'
import type { VelocityNetwork } from '../lib/models/velocity-network.ts'
import { linear, packWeight } from '../lib/ops/matmul.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { planFolder } from '../lib/plan-folder.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { someInputs } from './fixtures/networks.ts'
import { scramble, writePipeline } from './fixtures/tiny.ts'

const TOY = 'examples/shapes/model'
const PROMPT = { prompt: 'a green square moving left on a grey background', seed: 3 }
const folder = mkdtempSync(join(tmpdir(), 'quantize-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const able = engine.packBytes(64, 64, 'bf16', 'int8') > 0
if (!able) console.warn('products in eight bits: skipped, this CPU has no exact ones (AVX-512 VNNI, AMX)')

// Two blocks of each kind, with heads that the published rotations fit.
const SIZES = {
  flux: {
    ...{
      in_channels: 16,
      num_layers: 2,
      num_single_layers: 2,
      attention_head_dim: 16,
      num_attention_heads: 8,
    },
    ...{ joint_attention_dim: 6, pooled_projection_dim: 5, axes_dims_rope: [4, 6, 6] },
  },
  mmdit: {
    ...{ _class_name: 'PyramidDiffusionMMDiT', sample_size: 8, in_channels: 4, num_layers: 2 },
    ...{ attention_head_dim: 16, num_attention_heads: 8, pos_embed_max_size: 6 },
    ...{ joint_attention_dim: 6, pooled_projection_dim: 5 },
  },
}

function made(family: keyof typeof SIZES, quantize?: 'int8'): VelocityNetwork {
  const network = createVelocityNetwork(SIZES[family], { seed: 3, pack: false })
  scramble(network.parameters, 0.5)
  if (!quantize) return network
  // Of the same values, which are there only now.
  const packed = createVelocityNetwork(SIZES[family], { seed: 3, quantize })
  scramble(packed.parameters, 0.5)
  for (const weight of packed.parameters.values()) {
    if (!weight.packed) continue
    const [n, k] = weight.shape as [number, number]
    const eight = weight.packed.bytes === engine.packBytes(n, k, 'f32', 'int8')
    weight.packed.dispose()
    weight.packed = null
    packWeight(weight, eight ? 'int8' : 'plain')
  }
  return packed
}

describe.skipIf(!able)('products in eight bits', () => {
  test('come near those of the type computed in, channels that stand out included', async () => {
    const generator = new Generator(5)
    const [x, w] = [generator.normal([40, 1920]), generator.normal([96, 1920], { mean: 0, std: 0.02 })]
    const plain = await linear(x, w).floats()
    packWeight(w, 'int8')
    expect(relativeL2(await linear(x, w).floats(), plain)).toBeLessThan(0.015)
    const loud = await x.floats()
    for (let i = 0; i < 40; i++) loud[i * 1920 + 77] = 60
    const stands = Tensor.from(loud, [40, 1920])
    const exact = generator.normal([96, 1920], { mean: 0, std: 0.02 })
    const wanted = await linear(stands, exact).floats()
    packWeight(exact, 'int8')
    expect(relativeL2(await linear(stands, exact).floats(), wanted)).toBeLessThan(0.04)
  })

  test.each(['flux', 'mmdit'] as const)(
    '%s: velocities, with kept history and without, and with an adapter',
    async (family) => {
      const [network, rounded] = [made(family), made(family, 'int8')]
      const inputs = { ...someInputs(), columns: someInputs().columns.slice(0, 1), timesteps: [10] }
      inputs.text = new Generator(8).normal([1, 3, 6])
      inputs.textMask = [[1, 1, 0]]
      inputs.pooled = new Generator(9).normal([1, 5])
      const layout = network.layout(inputs)
      const keys = new PastKeys(layout)
      const plain = network.forward(inputs)
      const near = rounded.forward({ ...inputs, layout, keep: keys })
      const again = rounded.forward({ ...inputs, layout, past: keys })
      const low = { a: new Generator(6).normal([4, 128]), b: new Generator(7).normal([128, 4]), scale: 1 }
      const adapters = new Map([['transformer_blocks.0.attn.to_out.0', low]])
      const [turned, turnedNear] = [network, rounded].map((n) => n.adapted(adapters).forward(inputs)[0])
      for (const [c, v] of near.entries()) {
        const wanted = await (plain[c] as typeof v).floats()
        const off = relativeL2(await v.floats(), wanted)
        expect(off).toBeGreaterThan(1e-4)
        expect(off).toBeLessThan(0.03)
        expect(relativeL2(await (again[c] as typeof v).floats(), wanted)).toBeLessThan(0.03)
        const other = await (turned as typeof v).floats()
        expect(relativeL2(other, wanted)).toBeGreaterThan(0.05)
        expect(relativeL2(await (turnedNear as typeof v).floats(), other)).toBeLessThan(0.03)
      }
    },
  )

  describe('in a pipeline', () => {
    let pipeline: Pipeline
    beforeAll(async () => {
      pipeline = await Pipeline.load(TOY, { dtype: 'bf16', quantize: 'int8' })
    })
    afterAll(() => pipeline.dispose())

    test('a video shows what its prompt says, says how it was made, and is made again to the same bits', async () => {
      const video = await pipeline.generate(PROMPT).result()
      expect(scoreClip(video.frames, video)).toMatchObject({
        colour: 'green',
        shape: 'square',
        motion: 'left',
      })
      expect(video.recipe).toMatchObject({ dtype: 'bf16', quantize: 'int8' })
      const generation = pipeline.generate(video.recipe)
      const warnings: string[] = []
      for await (const event of generation) if (event.type === 'warning') warnings.push(event.message)
      expect(warnings).toEqual([])
      expect(Buffer.compare((await generation.result()).frames, video.frames)).toBe(0)
    })

    test('a pipeline without says that a recipe with it gives another video, and the other way round', async () => {
      const plain = await Pipeline.load(TOY, { dtype: 'bf16' })
      const short = { ...PROMPT, frames: 1 }
      for (const [from, to, text] of [
        [pipeline, plain, 'other rounding (int8, not none)'],
        [plain, pipeline, 'other rounding (none, not int8)'],
      ] as const) {
        const { recipe } = await from.generate(short).result()
        const generation = to.generate(recipe)
        const warnings: string[] = []
        for await (const event of generation) if (event.type === 'warning') warnings.push(event.message)
        expect(warnings).toHaveLength(1)
        expect(warnings[0]).toContain(text)
      }
      plain.dispose()
    })

    test('the transformer takes less memory, as a plan of the folder says', async () => {
      const plain = await planFolder(TOY, { dtype: 'bf16' })
      const plan = await planFolder(TOY, { dtype: 'bf16', quantize: 'int8' })
      expect(plan.quantize).toBe('int8')
      expect(plan.bytes.weights.transformer).toBeLessThan(0.75 * plain.bytes.weights.transformer)
      expect((await pipeline.plan()).bytes.weights).toEqual(plan.bytes.weights)
    })
  })

  test('weights that leave memory come back to the same bits', async () => {
    const dir = join(folder, 'wide')
    const sizes = { num_attention_heads: 8, attention_head_dim: 32, axes_dims_rope: [8, 12, 12] }
    const joint = { joint_attention_dim: 12, pooled_projection_dim: 12, num_layers: 1, num_single_layers: 2 }
    await writePipeline(dir, createVelocityNetwork({ ...sizes, ...joint }, { seed: 1 }))
    const short = { prompt: 'a red circle', frames: 9, seed: 3 }
    const stays = await Pipeline.load(dir, { quantize: 'int8' })
    const video = await stays.generate(short).result()
    stays.dispose()
    const roomy = await Pipeline.load(dir, { quantize: 'int8', maxMemory: 2 ** 40 })
    const limit = Math.round(
      (await roomy.plan(short)).bytes.peak - 0.5 * (roomy.transformer.offload?.bytes ?? 0),
    )
    roomy.dispose()
    const tight = await Pipeline.load(dir, { quantize: 'int8', maxMemory: limit })
    expect((await tight.plan(short)).offloaded).toBeGreaterThan(0)
    expect(Buffer.compare((await tight.generate(short).result()).frames, video.frames)).toBe(0)
    tight.dispose()
  })

  test('pipelines of one folder share weights of one rounding only', async () => {
    const before = await live()
    const first = await Pipeline.load(TOY, { dtype: 'bf16', quantize: 'int8' })
    const one = (await live()) - before
    const second = await Pipeline.load(TOY, { dtype: 'bf16', quantize: 'int8' })
    expect((await live()) - before).toBe(one)
    const plain = await Pipeline.load(TOY, { dtype: 'bf16' })
    expect((await live()) - before).toBeGreaterThan(1.5 * one)
    for (const p of [first, second, plain]) p.dispose()
    expect(await live()).toBe(before)
  })

  test('on the command line', () => {
    const out = join(folder, 'cli.webp')
    const args = ['--model', TOY, '--prompt', PROMPT.prompt, '--frames', '1', '--quantize', 'int8']
    const ran = execFileSync(process.execPath, [
      'dist/lib/cli/main.js',
      'generate',
      ...args,
      '--out',
      out,
      '--json',
    ])
    expect(JSON.parse(ran.toString()).recipe.quantize).toBe('int8')
    const plan = ['plan', '--model', TOY, '--quantize', 'int8', '--time']
    const text = execFileSync(process.execPath, ['dist/lib/cli/main.js', ...plan]).toString()
    expect(text).toContain('with products in int8')
  })
})

test('a level without them says so, and what to do', () => {
  const script = `
    const { Pipeline } = await import('./dist/lib/index.js')
    const text = await Pipeline.load('${TOY}', { quantize: 'int8' }).then(() => 'loaded', (e) => e.code + ' ' + e.message)
    const pipeline = await Pipeline.load('${TOY}')
    console.log(text, (await pipeline.generate({ prompt: 'a', frames: 1 }).result()).width)
  `
  const env = { ...process.env, PYRAFLOW_BACKEND: 'base' }
  const ran = execFileSync(process.execPath, ['--input-type=module', '-e', script], { env }).toString()
  expect(ran).toMatch(/^ERR_DEVICE .*eight bits.*cpu_base.*128\n$/s)
})

test('nothing else can be asked for, and not in training', async () => {
  const bad = { quantize: 'int4' } as unknown as { quantize: 'int8' }
  await expect(Pipeline.load(TOY, bad)).rejects.toMatchObject({ code: 'ERR_OPTION' })
  expect(() => createVelocityNetwork(SIZES.flux, { seed: 1, ...bad })).toThrow(/int8/)
  const training = { seed: 1, train: true, quantize: 'int8' as const }
  expect(() => createVelocityNetwork(SIZES.flux, training)).toThrow(/training/)
})
