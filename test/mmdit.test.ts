import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test, vi } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { maxAbsolute, relativeL2 } from '../lib/golden/compare.ts'
import { openSafetensors } from '../lib/io/safetensors.ts'
import { writeSafetensors } from '../lib/io/write-safetensors.ts'
import { PyramidDiffusionMMDiT } from '../lib/models/dit-mmdit.ts'
import { identify } from '../lib/models/identify.ts'
import { createVelocityNetwork, loadVelocityNetwork } from '../lib/models/load-network.ts'
import { checkMmditConfig, type MmditConfig, mmditParameterCount } from '../lib/models/mmdit-config.ts'
import { sincosTable, tablePlaces } from '../lib/models/patch-embed.ts'
import { latentNormalisation, sd3MmditConfig } from '../lib/models/presets.ts'
import type { TransformerInputs } from '../lib/models/velocity-network.ts'
import { roundToBf16 } from '../lib/nn/embed.ts'
import { concat } from '../lib/ops/copy.ts'
import { mse } from '../lib/ops/mse.ts'
import { mean } from '../lib/ops/reduce.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { makeLayout } from '../lib/pyramid/layout.ts'
import { scope } from '../lib/tensor/scope.ts'
import { backward, clearTape, noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { numbers, scramble, tinyLatents, tinyText, tinyVae } from './fixtures/tiny.ts'
import { goldenFolder } from './golden.ts'

const modelA = join(goldenFolder, 'models/mmdit_a/diffusion_transformer_384p')
const modelB = join(goldenFolder, 'models/mmdit_b/diffusion_transformer_384p')
const weightsB = join(modelB, 'diffusion_pytorch_model.safetensors')
const TABLE = 'pos_embed.pos_embed'
const folder = mkdtempSync(join(tmpdir(), 'mmdit-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const CONFIG: Partial<MmditConfig> = {
  sample_size: 8,
  in_channels: 4,
  num_layers: 2,
  attention_head_dim: 8,
  num_attention_heads: 2,
  joint_attention_dim: 6,
  pooled_projection_dim: 5,
  pos_embed_max_size: 6,
}

let draws = 0
const random = (...shape: number[]): Tensor =>
  Tensor.from(
    numbers(
      shape.reduce((a, b) => a * b),
      ++draws,
    ),
    shape,
  )

// Two columns with history of other sizes, so that places are interpolated, and padded text.
function inputs(channels = 4, text = 6, pooled = 5): TransformerInputs {
  return {
    columns: [
      [random(2, channels, 2, 2, 4), random(2, channels, 1, 4, 8)],
      [random(2, channels, 1, 4, 6), random(2, channels, 1, 8, 6)],
    ],
    timesteps: [10, 250, 500, 990],
    text: random(4, 5, text),
    textMask: [
      [1, 1, 1, 1, 1],
      [1, 1, 0, 0, 0],
      [1, 0, 0, 0, 0],
      [1, 1, 1, 1, 0],
    ],
    pooled: random(4, pooled),
  }
}

function tiny(options: { train?: boolean; dtype?: 'f32' | 'bf16'; config?: Partial<MmditConfig> } = {}) {
  const { config, ...rest } = options
  // Packed copies would not follow the values that tests write.
  return PyramidDiffusionMMDiT.create({ ...CONFIG, ...config }, { seed: 3, pack: false, ...rest })
}

// The mean error of both columns, each against a constant.
const lossOf = (model: PyramidDiffusionMMDiT, call: TransformerInputs): Tensor =>
  mean(
    concat(
      model.forward(call).map((v, c) => mse(v, Tensor.full(v.shape, c === 0 ? 0.3 : -0.2))),
      0,
    ),
  )

/** Gradients of every parameter and, first, of the inputs. */
async function gradients(
  model: PyramidDiffusionMMDiT,
  call: TransformerInputs,
  leaves: readonly (readonly [string, Tensor])[] = [...model.parameters],
): Promise<Map<string, Float32Array>> {
  scope(() => backward(lossOf(model, call)))
  clearTape()
  const found = new Map<string, Float32Array>()
  for (const [name, leaf] of leaves) {
    found.set(name, await (leaf.grad as Tensor).floats())
    leaf.grad?.dispose()
    leaf.grad = null
  }
  return found
}

test('gradients are those of finite differences along a random direction of every parameter and input', async () => {
  const model = tiny({ train: true })
  scramble(model.parameters, 0.5)
  const call = inputs()
  const named: [string, Tensor][] = [
    ['text', call.text],
    ['pooled', call.pooled],
    ...call.columns.flatMap((clips, c) => clips.map((t, j): [string, Tensor] => [`clip ${c}.${j}`, t])),
  ]
  for (const [, t] of named) t.requiresGrad = true
  const leaves = [...named, ...model.parameters]
  const found = await gradients(model, call, leaves)
  const loss = async (): Promise<number> => noGrad(() => scope(() => lossOf(model, call))).item()
  const scale = Math.sqrt(
    [...found.values()].reduce((sum, g) => sum + g.reduce((n, v) => n + v * v, 0), 0) / leaves.length,
  )
  for (const [k, [name, leaf]] of leaves.entries()) {
    const value = await leaf.floats()
    const raw = numbers(value.length, 900 + k)
    const length = Math.hypot(...raw)
    const direction = raw.map((v) => v / length)
    const at = async (step: number): Promise<number> => {
      leaf.write(value.map((v, i) => v + step * (direction[i] as number)))
      return loss()
    }
    const h = 0.02
    const slope = (8 * ((await at(h)) - (await at(-h))) - ((await at(2 * h)) - (await at(-2 * h)))) / (12 * h)
    leaf.write(value)
    const gradient = (found.get(name) as Float32Array).reduce(
      (n, g, i) => n + g * (direction[i] as number),
      0,
    )
    expect(Math.abs(slope - gradient) / (Math.abs(gradient) + 0.1 * scale), name).toBeLessThan(3e-3)
  }
  model.dispose()
})

test('the last blocks, from the share on, are computed again in backward, with the same gradients', async () => {
  const model = tiny({ train: true, config: { num_layers: 3 } })
  scramble(model.parameters, 0.5)
  const call = inputs()
  const kept = await gradients(model, call)
  const expected: [share: number, blocks: number][] = [
    [0, 3],
    [0.5, 2],
    [1, 0],
  ]
  for (const [share, blocks] of expected) {
    model.checkpointing = share
    const run = vi.spyOn(engine, 'run')
    const again = await gradients(model, call)
    const attentions = run.mock.calls.filter(([op]) => op === 'attention').length
    run.mockRestore()
    expect(attentions, `at ${share}`).toBe(3 + blocks)
    for (const [name, gradient] of kept) {
      // Summed in another order: equal but for rounding.
      expect(relativeL2(again.get(name) ?? [], gradient), `${name} at ${share}`).toBeLessThan(1e-5)
    }
  }
  model.dispose()
})

test('bf16 training gives gradients near those of f32', async () => {
  const call = inputs()
  const found: Map<string, Float32Array>[] = []
  for (const dtype of ['f32', 'bf16'] as const) {
    const model = tiny({ train: true, dtype })
    let seed = 1
    for (const p of model.parameters.values()) {
      const values = Tensor.from(numbers(p.size, seed++, 0.5).map(roundToBf16), p.shape)
      engine.run('cast', [values], [p], [])
      values.dispose()
    }
    found.push(await gradients(model, { ...call, roundTimesteps: false }))
    model.dispose()
  }
  const [exact, coarse] = found.map((gradient) => [...gradient.values()].flatMap((g) => [...g]))
  expect(relativeL2(coarse as number[], exact as number[])).toBeLessThan(0.05)
})

test('columns packed together give what each gives alone', async () => {
  const model = tiny()
  scramble(model.parameters, 0.5)
  const call = inputs()
  const packed = model.forward(call)
  const rowsOf = async (t: Tensor, c: number): Promise<Tensor> => {
    const values = await t.floats()
    const size = t.size / 4
    const rows = [c, 2 + c].flatMap((r) => [...values.subarray(r * size, (r + 1) * size)])
    return Tensor.from(rows, [2, ...t.shape.slice(1)])
  }
  for (const c of [0, 1]) {
    const [alone] = model.forward({
      columns: [call.columns[c] as Tensor[]],
      timesteps: [call.timesteps[c] as number, call.timesteps[2 + c] as number],
      text: await rowsOf(call.text, c),
      textMask: [c, 2 + c].map((r) => (call.textMask as number[][])[r] as number[]),
      pooled: await rowsOf(call.pooled, c),
    })
    const error = relativeL2(await (packed[c] as Tensor).floats(), await (alone as Tensor).floats())
    expect(error).toBeLessThan(1e-6)
  }
  model.dispose()
})

test('a later frame does not change an earlier one, unless attention is asked to look ahead', async () => {
  const model = tiny()
  scramble(model.parameters, 0.5)
  const clip = random(1, 4, 2, 4, 4)
  const other = Tensor.from(
    (await clip.floats()).map((v, i) => (Math.floor(i / 16) % 2 === 1 ? v + 1 : v)),
    clip.shape,
  )
  const rest = { timesteps: [500], text: random(1, 3, 6), pooled: random(1, 5) }
  const firstFrames = async (x: Tensor, causal: boolean): Promise<number[]> => {
    const [v] = model.forward({ columns: [[x]], ...rest, causal })
    return [...(await (v as Tensor).floats())].filter((_, i) => Math.floor(i / 16) % 2 === 0)
  }
  expect(await firstFrames(other, true)).toEqual(await firstFrames(clip, true))
  expect(await firstFrames(other, false)).not.toEqual(await firstFrames(clip, false))
  model.dispose()
})

test('a forward without training frees everything but its outputs', async () => {
  const model = await PyramidDiffusionMMDiT.fromPretrained(modelB)
  const call = inputs(16, 20, 12)
  await engine.idle()
  const before = engine.memory().live
  const outputs = model.forward(call)
  await engine.idle()
  const bytes = outputs.reduce((sum, t) => sum + t.bytes, 0)
  expect(engine.memory().live - before).toBeLessThan(bytes + 1024)
  for (const t of outputs) t.dispose()
  await engine.idle()
  expect(engine.memory().live).toBe(before)
  model.dispose()
})

test('a fresh network predicts zero and has every published key', async () => {
  const model = tiny({ train: true })
  for (const v of noGrad(() => model.forward(inputs()))) {
    expect((await v.floats()).every((x) => x === 0)).toBe(true)
  }
  const patch = await (model.parameters.get('pos_embed.proj.weight') as Tensor).floats()
  const bound = Math.sqrt(6 / (16 + 16))
  const largest = Math.max(...patch.map(Math.abs))
  expect(largest).toBeLessThanOrEqual(bound)
  expect(largest).toBeGreaterThan(bound * 0.95)
  const sizes = [...model.parameters.values()].reduce((sum, p) => sum + p.size, 0)
  expect(sizes).toBe(mmditParameterCount(CONFIG))
  model.dispose()

  const loaded = await PyramidDiffusionMMDiT.fromPretrained(modelB)
  const published = [...openSafetensors(weightsB).entries.keys()]
  expect([...loaded.parameters.keys(), ...loaded.buffers.keys()].sort()).toEqual(published.sort())
  loaded.dispose()
})

test('the published configuration has 2,028,334,144 parameters and a table of 56,623,104', () => {
  expect(mmditParameterCount(sd3MmditConfig)).toBe(2_028_334_144)
  const { pos_embed_max_size: side, num_attention_heads: heads, attention_head_dim: headDim } = sd3MmditConfig
  expect(side ** 2 * heads * headDim).toBe(56_623_104)
})

describe('the position table', () => {
  test('is computed as published files store it', () => {
    for (const dir of [modelA, modelB]) {
      const config = JSON.parse(readFileSync(join(dir, 'config.json'), 'utf8')) as MmditConfig
      const { pos_embed_max_size: side, sample_size: sample, caption_projection_dim: width } = config
      const stored = openSafetensors(join(dir, 'diffusion_pytorch_model.safetensors')).readFloats(TABLE)
      expect(maxAbsolute(sincosTable(side, sample / 2, width), stored)).toBeLessThan(1e-6)
    }
  })

  const options = { channels: 4, width: 16, tableSize: 9, baseSize: 4, interpolate: true }
  const layoutOf = (...clips: [frames: number, height: number, width: number][]) =>
    makeLayout({
      columns: [{ clips: clips.map(([frames, height, width]) => ({ frames, height, width })) }],
      batch: 2,
      textLength: 1,
      headAxes: [8],
      causal: true,
    })
  // Where each token lies: the mean of its corners' rows and columns.
  const placesOf = (layout: ReturnType<typeof layoutOf>, interpolate = true): [number, number][] => {
    const { corners, tokens } = tablePlaces(layout, { ...options, interpolate })
    return Array.from(tokens, (p) => {
      let [y, x, total] = [0, 0, 0]
      for (const { index, weight } of corners) {
        y += weight[p]! * Math.floor(index[p]! / 9)
        x += weight[p]! * (index[p]! % 9)
        total += weight[p]!
      }
      expect(total).toBeCloseTo(1, 6)
      return [y, x]
    })
  }

  test('is cropped at its centre, and resized for history', () => {
    const layout = layoutOf([2, 2, 4], [1, 4, 8])
    const places = placesOf(layout)
    // The 2×4 patches of the last clip begin at row (9 − 2) div 2 and column (9 − 4) div 2.
    const last = [3, 4].flatMap((y) => [2, 3, 4, 5].map((x) => [y, x]))
    // History has 1×2 patches on that window: row 0.5, columns 0.5 and 2.5; both frames alike.
    const frame = [
      [3.5, 2.5],
      [3.5, 4.5],
    ]
    const sequence = [...frame, ...frame, ...last]
    expect(places).toEqual([...sequence, ...sequence])
  })

  test('is resized by ratios that are not whole', () => {
    const [places] = [placesOf(layoutOf([1, 6, 6], [1, 14, 14]))]
    const rows = [0, 3, 6].map((i) => places[i]?.[0] as number)
    const expected = [2 / 3, 3, 16 / 3].map((y) => 1 + y)
    rows.forEach((y, i) => {
      expect(y).toBeCloseTo(expected[i] as number, 6)
    })
  })

  test('gives each clip a window of its own when history is not interpolated', () => {
    const places = placesOf(layoutOf([1, 2, 4], [1, 4, 8]), false)
    expect(places.slice(0, 2)).toEqual([
      [4, 3],
      [4, 4],
    ])
    expect(places[2]).toEqual([3, 2])
  })

  test('is refused for grids larger than it', () => {
    const model = tiny()
    const call = { ...inputs(), columns: [[random(4, 4, 1, 14, 4)]] }
    expect(() => model.forward(call)).toThrow(
      expect.objectContaining({ code: 'ERR_SHAPE', message: expect.stringMatching(/at most 6×6.*7×2/) }),
    )
    model.dispose()
  })
})

describe('folders', () => {
  async function write(name: string, skip: string[], config: object = {}): Promise<string> {
    const dir = join(folder, name)
    mkdirSync(dir)
    const source = openSafetensors(weightsB)
    const list = [...source.entries]
      .filter(([key]) => !skip.includes(key))
      .map(([key, { shape }]) => ({
        name: key,
        dtype: 'F32' as const,
        shape: [...shape],
        data: source.readFloats(key),
      }))
    await writeSafetensors(join(dir, 'diffusion_pytorch_model.safetensors'), list)
    const standard = JSON.parse(readFileSync(join(modelB, 'config.json'), 'utf8'))
    writeFileSync(join(dir, 'config.json'), JSON.stringify({ ...standard, ...config }))
    return dir
  }

  test('a saved network loads again with the same values, in f32 and bf16', async () => {
    const model = await PyramidDiffusionMMDiT.fromPretrained(modelB)
    for (const dtype of ['f32', 'bf16'] as const) {
      const dir = join(folder, `saved-${dtype}`)
      await model.save(dir, { dtype })
      const again = await loadVelocityNetwork(dir)
      expect(again).toBeInstanceOf(PyramidDiffusionMMDiT)
      expect(again.config).toEqual(model.config)
      expect(again.buffers.get(TABLE)).toBeDefined()
      for (const [name, p] of [...model.parameters, ...model.buffers]) {
        const values = await p.floats()
        const read = again.parameters.get(name) ?? again.buffers.get(name)
        const kept = dtype === 'f32' || name === TABLE
        expect(await (read as Tensor).floats(), name).toEqual(kept ? values : values.map(roundToBf16))
      }
      again.dispose()
    }
    model.dispose()
  })

  test('a table that the file lacks is computed, any other key is missed', async () => {
    const model = await PyramidDiffusionMMDiT.fromPretrained(await write('no-table', [TABLE]))
    const stored = openSafetensors(weightsB).readFloats(TABLE)
    expect(maxAbsolute(await (model.buffers.get(TABLE) as Tensor).floats(), stored)).toBeLessThan(1e-6)
    model.dispose()
    const key = 'transformer_blocks.2.norm1_context.linear.weight'
    await expect(PyramidDiffusionMMDiT.fromPretrained(await write('no-key', [key]))).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining(key),
    })
  })

  test('say which network they hold', async () => {
    expect(identify(modelB)).toBe('mmdit')
    expect(identify(weightsB)).toBe('mmdit')
    await expect(
      loadVelocityNetwork(join(goldenFolder, 'models/mmdit_a/causal_video_vae')),
    ).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringMatching(/PyramidDiffusionMMDiT/),
    })
    const flux = createVelocityNetwork({ num_layers: 1, num_single_layers: 0 }, { seed: 1 })
    expect(flux.modelConfig()._class_name).toBe('PyramidFluxTransformer')
    flux.dispose()
  })
})

describe('a configuration', () => {
  test('without the settings of the reference’s loader gets them', () => {
    const published = {
      _class_name: 'PyramidDiffusionMMDiT',
      caption_projection_dim: 1536,
      qk_norm: 'rms_norm',
    }
    expect(checkMmditConfig(published, 'ERR_CHECKPOINT')).toMatchObject({
      use_t5_mask: true,
      add_temp_pos_embed: true,
      temp_pos_embed_type: 'rope',
      interp_condition_pos: true,
    })
  })

  const wrong: [object, RegExp][] = [
    [{ _class_name: 'PyramidFluxTransformer' }, /_class_name.*PyramidDiffusionMMDiT/],
    [{ qk_norm: null }, /qk_norm.*rms_norm/],
    [{ qk_norm: 'layer_norm' }, /qk_norm.*layer_norm/],
    [{ temp_pos_embed_type: 'sincos' }, /temp_pos_embed_type.*rope/],
    [{ pos_embed_type: 'rope' }, /pos_embed_type.*sincos/],
    [{ add_temp_pos_embed: false }, /add_temp_pos_embed/],
    [{ patch_size: 1 }, /patch_size.*2/],
    [{ caption_projection_dim: 1152 }, /caption_projection_dim.*16.*1152/],
    [{ use_flash_attn: true }, /use_flash_attn.*use_temporal_causal/],
    [{ attention_head_dim: 7 }, /attention_head_dim.*even/],
    [{ num_layers: 0 }, /num_layers.*from 1/],
    [{ gradient_checkpointing_ratio: 2 }, /gradient_checkpointing_ratio.*0 to 1/],
  ]
  test.each(wrong)('%o is refused by name', (change, message) => {
    expect(() => tiny({ config: change })).toThrow(
      expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringMatching(message) }),
    )
  })
})

describe('inputs that do not fit', () => {
  const wrong: [string, Partial<TransformerInputs>, string, RegExp][] = [
    ['no columns', { columns: [] }, 'ERR_SHAPE', /columns/],
    ['too few times', { timesteps: [1, 2] }, 'ERR_SHAPE', /timesteps.*4/],
    ['text of another width', { text: Tensor.zeros([4, 5, 7]) }, 'ERR_SHAPE', /text.*\[4, S, 6\]/],
    ['a mask of another length', { textMask: [[1], [1], [1], [1]] }, 'ERR_SHAPE', /textMask/],
    ['a pooled vector of another width', { pooled: Tensor.zeros([4, 9]) }, 'ERR_SHAPE', /pooled/],
    [
      'clips of another channel count',
      { columns: [[random(4, 16, 1, 4, 4)]] },
      'ERR_SHAPE',
      /\[4, 4, t, h, w\]/,
    ],
    ['clips of odd width', { columns: [[random(4, 4, 1, 4, 3)]] }, 'ERR_SHAPE', /column 0.*even/],
  ]
  test.each(wrong)('%s: refused by name', (_, change, code, message) => {
    const model = tiny()
    expect(() => model.forward({ ...inputs(), ...change })).toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    )
    model.dispose()
  })
})

describe('the whole path', () => {
  const config = { ...CONFIG, in_channels: 16, joint_attention_dim: 12, pooled_projection_dim: 12 }

  test('a trainer trains it, leaves the table alone and writes a folder that loads', async () => {
    const model = tiny({ train: true, dtype: 'bf16', config })
    const table = await (model.buffers.get(TABLE) as Tensor).floats()
    const data = await tinyLatents(join(folder, 'latents'))
    const trainer = new Trainer({
      ...{ model, data, text: tinyText(), out: join(folder, 'run'), steps: 3 },
      ...{ batchSize: 4, learningRate: 1e-2, warmupSteps: 1, optimizer: { emaDecay: 0 } },
    })
    const losses: number[] = []
    for await (const event of trainer.run()) if (event.type === 'step') losses.push(event.loss)
    expect(losses.length).toBe(3)
    expect(losses.every(Number.isFinite)).toBe(true)
    const dir = join(folder, 'trained')
    await trainer.save(dir)
    const again = await loadVelocityNetwork(dir, { dtype: 'bf16' })
    expect(again.buffers.get(TABLE)?.dtype).toBe('f32')
    expect(await (again.buffers.get(TABLE) as Tensor).floats()).toEqual(table)
    const bias = 'proj_out.bias'
    const trained = await (again.parameters.get(bias) as Tensor).floats()
    expect(trained.some((v) => v !== 0)).toBe(true)
    expect(trained).toEqual(await (model.parameters.get(bias) as Tensor).floats())
    for (const owner of [trainer, model, again, data]) owner.dispose()
  })

  test('a pipeline chooses the network and its normalisation by the folder', async () => {
    const dir = join(folder, 'pipeline')
    const model = tiny({ config })
    scramble(model.parameters)
    await model.save(join(dir, 'diffusion_transformer_384p'))
    const vae = tinyVae()
    await vae.save(join(dir, 'causal_video_vae'))
    await tinyText().save(join(dir, 'text_encoder'))
    const pipeline = await Pipeline.load(dir)
    expect(pipeline.transformer).toBeInstanceOf(PyramidDiffusionMMDiT)
    expect(pipeline.config.normalisation).toEqual(latentNormalisation.mmdit)
    const generation = pipeline.generate({
      ...{ prompt: 'a red circle', width: 64, height: 64, allowUntrained: true, frames: 9 },
      ...{ steps: [1, 1, 1], videoSteps: [1, 1, 1] },
    })
    const video = await generation.result()
    expect(video.frames.length).toBe(9 * 64 * 64 * 3)
    for (const owner of [pipeline, model, vae]) owner.dispose()
  })
})
