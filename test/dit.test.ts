import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { runDitCase } from '../lib/golden/cases-dit.ts'
import { relativeL2 } from '../lib/golden/compare.ts'
import { openSafetensors } from '../lib/io/safetensors.ts'
import { writeSafetensors } from '../lib/io/write-safetensors.ts'
import { PyramidFluxTransformer, parameterCount, type TransformerInputs } from '../lib/models/dit-flux.ts'
import { identify } from '../lib/models/identify.ts'
import { miniFluxConfig } from '../lib/models/presets.ts'
import { roundToBf16 } from '../lib/nn/embed.ts'
import { mse } from '../lib/ops/mse.ts'
import { mean } from '../lib/ops/reduce.ts'
import { scope } from '../lib/tensor/scope.ts'
import { backward, noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { goldenFolder } from './golden.ts'

const CASES = ['a_single', 'a_history_cfg', 'a_packed3', 'b_single', 'b_history_cfg', 'b_packed3']
const modelB = join(goldenFolder, 'models/flux_b/diffusion_transformer_384p')
const folder = mkdtempSync(join(tmpdir(), 'dit-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

for (const dtype of ['f32', 'bf16'] as const) {
  describe(`recorded cases in ${dtype}`, () => {
    for (const name of CASES) {
      test(`dit_flux_${name} gives the reference's numbers`, async () => {
        const dir = join(goldenFolder, `dit_flux_${name}`)
        const json = JSON.parse(readFileSync(join(dir, 'case.json'), 'utf8'))
        const checks = await runDitCase(dir, json, { dtype })
        expect(checks.length).toBeGreaterThan(0)
        expect(checks.filter(({ error, tolerance }) => !(error <= tolerance))).toEqual([])
      })
    }
  })
}

const CONFIG = {
  num_layers: 3,
  num_single_layers: 3,
  attention_head_dim: 16,
  num_attention_heads: 2,
  joint_attention_dim: 12,
  pooled_projection_dim: 8,
  axes_dims_rope: [4, 6, 6] as [number, number, number],
}

// Every parameter random, since fresh networks give zero; inputs from the same simple sequence.
let seed = 1
const noise = (n: number, size = 1): Float32Array =>
  Float32Array.from({ length: n }, () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0
    return (seed / 2 ** 31 - 1) * size
  })
function scramble(model: PyramidFluxTransformer): void {
  for (const p of model.parameters.values()) p.write(noise(p.size, p.rank > 1 ? 0.2 : 1))
}
const random = (...shape: number[]): Tensor => Tensor.from(noise(shape.reduce((a, b) => a * b)), shape)
function inputs(): TransformerInputs {
  return {
    columns: [[random(2, 16, 2, 2, 4), random(2, 16, 1, 4, 8)], [random(2, 16, 1, 4, 8)]],
    timesteps: [10, 250, 500, 990],
    text: random(4, 5, 12),
    textMask: [
      [1, 1, 1, 1, 1],
      [1, 1, 0, 0, 0],
      [1, 0, 0, 0, 0],
      [1, 1, 1, 1, 0],
    ],
    pooled: random(4, 8),
  }
}

async function gradients(
  model: PyramidFluxTransformer,
  call: TransformerInputs,
): Promise<Map<string, Float32Array>> {
  scope(() => {
    const [a, b] = model.forward(call) as [Tensor, Tensor]
    const zero = Tensor.zeros(a.shape)
    backward(mean(mse(a, b)))
    return zero
  }).dispose()
  const found = new Map<string, Float32Array>()
  for (const [name, p] of model.parameters) {
    found.set(name, await (p.grad as Tensor).floats())
    p.grad?.dispose()
    p.grad = null
  }
  return found
}

test('recomputing blocks in backward gives the same gradients', async () => {
  const model = PyramidFluxTransformer.create(CONFIG, { seed: 3, train: true })
  scramble(model)
  const call = inputs()
  const kept = await gradients(model, call)
  for (const ratio of [0, 0.5, 1]) {
    model.checkpointing = ratio
    const again = await gradients(model, call)
    for (const [name, gradient] of kept) {
      expect(relativeL2(again.get(name) ?? [], gradient), `${name} at ${ratio}`).toBeLessThan(1e-5)
    }
  }
  model.dispose()
})

test('bf16 training gives gradients near those of f32', async () => {
  const call = inputs()
  const found: Map<string, Float32Array>[] = []
  for (const dtype of ['f32', 'bf16'] as const) {
    seed = 77
    const model = PyramidFluxTransformer.create(CONFIG, { seed: 3, train: true, dtype })
    for (const p of model.parameters.values()) {
      const values = Tensor.from(noise(p.size, p.rank > 1 ? 0.2 : 1).map(roundToBf16), p.shape)
      engine.run('cast', [values], [p], [])
      values.dispose()
    }
    found.push(await gradients(model, { ...call, roundTimesteps: false }))
    model.dispose()
  }
  const [exact, coarse] = found.map((gradient) => [...gradient.values()].flatMap((g) => [...g]))
  expect(relativeL2(coarse, exact)).toBeLessThan(0.05)
})

test('packed weights give the output of unpacked ones, in f32 and bf16', async () => {
  for (const dtype of ['f32', 'bf16'] as const) {
    const packed = await PyramidFluxTransformer.fromPretrained(modelB, { dtype })
    const plain = await PyramidFluxTransformer.fromPretrained(modelB, { dtype, pack: false })
    const call = { ...inputs(), text: random(4, 5, 20), pooled: random(4, 12) }
    const [a, b] = [packed, plain].map((model) => model.forward(call)[0] as Tensor)
    expect(relativeL2(await a.floats(), await b.floats())).toBeLessThan(dtype === 'f32' ? 1e-5 : 1e-2)
    packed.dispose()
    plain.dispose()
  }
})

test('a forward without training frees everything but its outputs', async () => {
  const model = await PyramidFluxTransformer.fromPretrained(modelB)
  const call = { ...inputs(), text: random(4, 5, 20), pooled: random(4, 12) }
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

test('a layout made once serves every step, and one for other sizes is refused', async () => {
  const model = PyramidFluxTransformer.create(CONFIG, { seed: 1 })
  scramble(model)
  const call = inputs()
  const layout = model.layout(call)
  const [a] = model.forward(call) as [Tensor]
  const [b] = model.forward({ ...call, layout }) as [Tensor]
  expect(await a.floats()).toEqual(await b.floats())
  const other = { ...call, columns: [[random(2, 16, 1, 4, 8)], [random(2, 16, 1, 4, 8)]] }
  expect(() => model.forward({ ...other, layout })).toThrow(expect.objectContaining({ code: 'ERR_SHAPE' }))
  model.dispose()
})

test('a fresh network predicts zero, has every published key, and depends on its seed alone', async () => {
  const model = PyramidFluxTransformer.create(CONFIG, { seed: 5, train: true })
  const twin = PyramidFluxTransformer.create(CONFIG, { seed: 5 })
  const [velocity] = noGrad(() => model.forward(inputs())) as [Tensor]
  expect((await velocity.floats()).every((v) => v === 0)).toBe(true)
  const key = 'transformer_blocks.1.attn.to_q.weight'
  const weight = await (model.parameters.get(key) as Tensor).floats()
  expect(await (twin.parameters.get(key) as Tensor).floats()).toEqual(weight)
  const bound = Math.sqrt(6 / 64)
  expect(Math.max(...weight.map(Math.abs))).toBeLessThanOrEqual(bound)
  expect(Math.max(...weight.map(Math.abs))).toBeGreaterThan(bound * 0.95)
  const sizes = [...model.parameters.values()].reduce((sum, p) => sum + p.size, 0)
  expect(sizes).toBe(parameterCount(CONFIG))
  const published = [...openSafetensors(join(modelB, 'diffusion_pytorch_model.safetensors')).entries.keys()]
  const loaded = await PyramidFluxTransformer.fromPretrained(modelB)
  expect([...loaded.parameters.keys()].sort()).toEqual(published.sort())
})

test('the published configuration has 1,972,059,200 parameters', () => {
  expect(parameterCount(miniFluxConfig)).toBe(1_972_059_200)
})

test('times are rounded to bf16 as the reference sampler rounds them', () => {
  const pairs = [1000, 1000, 986.54, 988, 973.08, 972, 744.256, 744, 704.262, 704, 386.358, 386, 343.265, 344]
  for (let i = 0; i < pairs.length; i += 2) expect(roundToBf16(pairs[i] as number)).toBe(pairs[i + 1])
  expect(roundToBf16(1.385)).toBe(1.3828125)
})

describe('weights that do not fit', () => {
  const source = openSafetensors(join(modelB, 'diffusion_pytorch_model.safetensors'))
  type Change = (tensors: Map<string, { shape: number[]; data: Float32Array }>) => void
  async function write(name: string, change: Change, config: object = {}): Promise<string> {
    const dir = join(folder, name)
    const tensors = new Map<string, { shape: number[]; data: Float32Array }>()
    for (const [key, { shape }] of source.entries)
      tensors.set(key, { shape: [...shape], data: source.readFloats(key) })
    change(tensors)
    const list = [...tensors].map(([key, { shape, data }]) => ({
      name: key,
      dtype: 'F32' as const,
      shape,
      data,
    }))
    mkdirSync(dir)
    await writeSafetensors(join(dir, 'diffusion_pytorch_model.safetensors'), list)
    const standard = JSON.parse(readFileSync(join(modelB, 'config.json'), 'utf8'))
    writeFileSync(join(dir, 'config.json'), JSON.stringify({ ...standard, ...config }))
    return dir
  }
  const key = 'transformer_blocks.0.attn.to_q.weight'
  const refused = (dir: string, text: RegExp): Promise<void> =>
    expect(PyramidFluxTransformer.fromPretrained(dir)).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringMatching(text),
    })

  test('a missing key is named with its shape and the nearest one', async () => {
    const dir = await write('missing', (t) => t.delete(key))
    await refused(dir, /missing 'transformer_blocks\.0\.attn\.to_q\.weight'.*\[48, 48\].*nearest is/)
  })

  test('keys of another model are named', async () => {
    const dir = await write('extra', (t) =>
      t.set('guidance.weight', { shape: [1], data: Float32Array.of(1) }),
    )
    await refused(dir, /guidance\.weight/)
  })

  test('another shape is named with the expected one', async () => {
    const dir = await write('shape', (t) => t.set(key, { shape: [24, 96], data: new Float32Array(24 * 96) }))
    await refused(dir, /\[48, 48\].*\[24, 96\]/)
  })

  test('values that are not finite are named', async () => {
    const dir = await write('nan', (t) => {
      ;(t.get(key) as { data: Float32Array }).data[7] = Number.NaN
    })
    await refused(dir, /transformer_blocks\.0\.attn\.to_q\.weight.*finite/)
  })

  test('a training checkpoint with dit. keys loads, and its other models are left alone', async () => {
    const dir = await write('prefixed', (t) => {
      for (const [k, value] of [...t]) {
        t.delete(k)
        t.set(`dit.${k}`, value)
      }
      t.set('vae.encoder.weight', { shape: [1], data: Float32Array.of(1) })
    })
    const model = await PyramidFluxTransformer.fromPretrained(dir)
    expect(model.parameters.has(key)).toBe(true)
    expect(identify(dir)).toBe('flux')
    model.dispose()
  })

  test('fields of config.json that are unknown are ignored and wrong ones are named', async () => {
    const fine = await write('unknown-field', () => {}, { new_field: 1 })
    ;(await PyramidFluxTransformer.fromPretrained(fine)).dispose()
    await refused(await write('axes', () => {}, { axes_dims_rope: [4, 6, 8] }), /axes_dims_rope.*16/)
    await refused(await write('class', () => {}, { _class_name: 'CausalVideoVAE' }), /_class_name/)
    const unknown = await write('unknown-class', () => {}, { _class_name: 'PyramidFluxTransfomer' })
    expect(() => identify(unknown)).toThrow(/nearest is PyramidFluxTransformer/)
    expect(() => PyramidFluxTransformer.create({ num_layers: -1 }, { seed: 1 })).toThrow(
      expect.objectContaining({ code: 'ERR_OPTION' }),
    )
  })

  test('a saved network loads again with the same values', async () => {
    const model = await PyramidFluxTransformer.fromPretrained(modelB)
    await model.save(join(folder, 'saved'))
    const again = await PyramidFluxTransformer.fromPretrained(join(folder, 'saved'))
    expect(again.config).toEqual(model.config)
    for (const [name, p] of model.parameters) {
      expect(await (again.parameters.get(name) as Tensor).floats()).toEqual(await p.floats())
    }
    model.dispose()
    again.dispose()
  })
})

test('folders say what they hold by class or by tensor names', async () => {
  expect(identify(modelB)).toBe('flux')
  expect(identify(join(modelB, 'diffusion_pytorch_model.safetensors'))).toBe('flux')
  const lone = join(folder, 'lone.safetensors')
  const file = (name: string) =>
    writeSafetensors(lone, [{ name, dtype: 'F32', shape: [1], data: Float32Array.of(1) }])
  await file('text_model.encoder.layers.0.self_attn.q_proj.weight')
  expect(identify(lone)).toBe('clip')
  await file('encoder.block.0.layer.0.SelfAttention.qq.weight')
  expect(() => identify(lone)).toThrow(/nearest is 'encoder\.block.*t5/)
})

describe('inputs that do not fit', () => {
  const model = () => PyramidFluxTransformer.create(CONFIG, { seed: 1 })
  const wrong: [string, Partial<TransformerInputs>, string, RegExp][] = [
    ['no columns', { columns: [] }, 'ERR_SHAPE', /columns/],
    ['a column without clips', { columns: [[], []] }, 'ERR_SHAPE', /columns/],
    ['too few times', { timesteps: [1, 2] }, 'ERR_SHAPE', /timesteps.*4/],
    ['a time that is not finite', { timesteps: [1, 2, Number.NaN, 4] }, 'ERR_SHAPE', /timesteps.*NaN/],
    ['times in a tensor', { timesteps: Tensor.zeros([4]) as unknown as number[] }, 'ERR_DTYPE', /timesteps/],
    ['text of another width', { text: Tensor.zeros([4, 5, 13]) }, 'ERR_SHAPE', /text.*\[4, S, 12\].*13/],
    ['text of other rows', { text: Tensor.zeros([2, 5, 12]) }, 'ERR_SHAPE', /text/],
    ['a mask of another length', { textMask: [[1], [1], [1], [1]] }, 'ERR_SHAPE', /textMask/],
    ['a pooled vector of another width', { pooled: Tensor.zeros([4, 9]) }, 'ERR_SHAPE', /pooled/],
    ['integers', { pooled: Tensor.zeros([4, 8], 'i32') }, 'ERR_DTYPE', /pooled.*i32/],
    [
      'clips of odd height',
      { columns: [[Tensor.zeros([2, 16, 1, 3, 8])], [Tensor.zeros([2, 16, 1, 4, 8])]] },
      'ERR_SHAPE',
      /column 0.*even/,
    ],
    [
      'clips of another channel count',
      { columns: [[Tensor.zeros([2, 8, 1, 4, 8])], [Tensor.zeros([2, 16, 1, 4, 8])]] },
      'ERR_SHAPE',
      /columns\[0\]\[0\].*16/,
    ],
  ]
  for (const [name, change, code, message] of wrong) {
    test(`${name}: refused by name`, () => {
      expect(() => model().forward({ ...inputs(), ...change })).toThrow(
        expect.objectContaining({ code, message: expect.stringMatching(message) }),
      )
    })
  }
})
