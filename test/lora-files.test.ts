import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { openSafetensors, type TensorToWrite, writeSafetensors } from '../lib/io/safetensors.ts'
import { type AdapterChoice, blendAdapters, openAdapters } from '../lib/lora/blend.ts'
import { openAdapter } from '../lib/lora/file.ts'
import { linearLayers } from '../lib/lora/layers.ts'
import { Lora } from '../lib/lora/lora.ts'
import { mergeAdapters } from '../lib/lora/merge.ts'
import { loadVelocityNetwork } from '../lib/models/load-network.ts'
import type { TransformerInputs, VelocityNetwork } from '../lib/models/velocity-network.ts'
import { noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { FAMILIES, someInputs } from './fixtures/networks.ts'
import { numbers, scramble, writePipeline } from './fixtures/tiny.ts'
import { relativeL2 } from './golden.ts'

const folder = mkdtempSync(join(tmpdir(), 'lora-files-'))
const base = FAMILIES.flux()
const saved = join(folder, 'saved.safetensors')
let lora: Lora

beforeAll(async () => {
  lora = Lora.create(base, { rank: 3, alpha: 6, seed: 2 })
  scramble(lora.parameters, 0.2)
  await lora.save(saved, { base: 'abc', recipe: { steps: 7 } })
})
afterAll(() => {
  lora.dispose()
  base.dispose()
  rmSync(folder, { recursive: true, force: true })
})

/** Of the outputs of networks that ought to be the same but for rounding, relative to their size. */
const TOLERANCE = { f32: 2e-5, bf16: 3e-2 } as const

async function outputs(
  network: VelocityNetwork,
  call: TransformerInputs = someInputs(),
): Promise<Float32Array> {
  const made = noGrad(() => network.forward(call))
  const all = await Promise.all(made.map((t) => t.floats()))
  for (const t of made) t.dispose()
  return Float32Array.from(all.flatMap((values) => [...values]))
}

async function blended(network: VelocityNetwork, choices: AdapterChoice[]): Promise<Float32Array> {
  const own = await blendAdapters(network, await openAdapters(network, choices))
  try {
    return await outputs(own.network)
  } finally {
    own.dispose()
  }
}

/** The saved adapter with its tensors named and changed otherwise. */
async function rewrite(
  name: string,
  change: (t: TensorToWrite & { data: Float32Array }) => TensorToWrite | TensorToWrite[],
  metadata?: Record<string, string>,
): Promise<string> {
  const file = openSafetensors(saved)
  const path = join(folder, name)
  const tensors = [...file.entries].flatMap(([key, { dtype, shape }]) =>
    change({ name: key, dtype, shape, data: file.readFloats(key) }),
  )
  await writeSafetensors(path, tensors, metadata ?? file.metadata)
  return path
}

const alphaTensor = (name: string, value: number): TensorToWrite => ({
  name,
  dtype: 'F32',
  shape: [],
  data: Float32Array.of(value),
})

describe('a saved adapter', () => {
  test('has the keys, shapes and header that peft and diffusers write', () => {
    const { entries, metadata } = openSafetensors(saved)
    expect(entries.size).toBe(lora.parameters.size)
    const key = 'transformer.single_transformer_blocks.0.attn.to_q'
    expect(entries.get(`${key}.lora_A.weight`)?.shape).toEqual([3, 32])
    expect(entries.get(`${key}.lora_B.weight`)?.shape).toEqual([32, 3])
    expect(metadata).toMatchObject({
      format: 'pt',
      rank: '3',
      alpha: '6',
      base_model_hash: 'abc',
      recipe: '{"steps":7}',
    })
    const settings = JSON.parse(metadata.lora_adapter_metadata!)
    expect(settings).toMatchObject({ 'transformer.r': 3, 'transformer.lora_alpha': 6 })
    expect(settings['transformer.target_modules']).toContain('single_transformer_blocks.0.attn.to_q')
  })

  test('comes back as it was, to be trained on or only to be added', async () => {
    const again = await Lora.load(base, saved)
    for (const [name, t] of lora.parameters) {
      expect(await again.parameters.get(name)!.floats(), name).toEqual(await t.floats())
      expect(again.parameters.get(name)!.requiresGrad).toBe(true)
    }
    const trained = await outputs(lora.network)
    expect(await outputs(again.network)).toEqual(trained)
    expect(relativeL2(await blended(base, [{ path: saved }]), trained)).toBeLessThan(TOLERANCE.f32)
    expect(relativeL2(trained, await outputs(base))).toBeGreaterThan(0.01)
    const second = join(folder, 'second.safetensors')
    await again.save(second, { base: 'abc', recipe: { steps: 7 } })
    expect(readFileSync(second)).toEqual(readFileSync(saved))
    again.dispose()
  })

  const spellings: [string, (key: string) => string][] = [
    ['peft', (key) => key.replace('transformer.', 'base_model.model.')],
    ['peft with the name of the adapter', (key) => key.replace('.weight', '.default.weight')],
    ['no prefix', (key) => key.replace('transformer.', '')],
    ['early diffusers', (key) => key.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')],
    ['down and up', (key) => key.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')],
    [
      'kohya',
      (key) => {
        const [, name = '', part] = /^transformer\.(.+)\.lora_(A|B)\.weight$/.exec(key) ?? []
        return `lora_unet_${name.replaceAll('.', '_')}.lora_${part === 'A' ? 'down' : 'up'}.weight`
      },
    ],
  ]
  test.each(spellings)('is read in the spelling of %s', async (_, spell) => {
    const path = await rewrite('spelled.safetensors', (t) => ({ ...t, name: spell(t.name) }))
    expect(await blended(base, [{ path }])).toEqual(await blended(base, [{ path: saved }]))
  })

  test('takes alpha from a tensor, else from the header of diffusers or kohya, else the rank', async () => {
    const name = 'transformer_blocks.0.attn.to_q'
    const alpha = async (path: string): Promise<number | undefined> =>
      (await openAdapter(path, linearLayers(base))).layers.get(name)?.alpha
    const settings = (s: object) => ({ lora_adapter_metadata: JSON.stringify(s) })
    const plain = (metadata: Record<string, string>) => rewrite('alpha.safetensors', (t) => t, metadata)
    expect(await alpha(await plain({}))).toBe(3)
    expect(await alpha(await plain({ ss_network_alpha: '1.5' }))).toBe(1.5)
    expect(await alpha(await plain(settings({ 'transformer.lora_alpha': 12 })))).toBe(12)
    const pattern = { 'transformer.lora_alpha': 12, 'transformer.alpha_pattern': { to_q: 5 } }
    expect(await alpha(await plain(settings(pattern)))).toBe(5)
    const stable = { 'transformer.lora_alpha': 12, 'transformer.use_rslora': true }
    expect(await alpha(await plain(settings(stable)))).toBeCloseTo(12 * Math.sqrt(3), 9)
    const path = await rewrite('tensor.safetensors', (t) =>
      t.name.includes('lora_A') ? [t, alphaTensor(t.name.replace('lora_A.weight', 'alpha'), 9)] : t,
    )
    expect(await alpha(path)).toBe(9)
    const third = await blended(base, [{ path, scale: 1 }])
    expect(relativeL2(third, await blended(base, [{ path: saved, scale: 1.5 }]))).toBeLessThan(TOLERANCE.f32)
  })
})

describe('a file that is no adapter of this network is refused with', () => {
  const name = 'transformer.transformer_blocks.0.attn.to_q.lora_A.weight'
  const only = (key: string, change: Partial<TensorToWrite>) => (t: TensorToWrite & { data: Float32Array }) =>
    t.name === key ? { ...t, ...change } : t
  const fails = async (path: string, message: RegExp, code = 'ERR_CHECKPOINT'): Promise<void> => {
    const before = await live()
    const error = await blended(base, [{ path }]).catch((e: unknown) => e)
    expect(error).toMatchObject({ code, message: expect.stringMatching(message) })
    expect(String(error)).toContain(path)
    expect(await live()).toBe(before)
  }

  test('the key that no layer has and the nearest one', async () => {
    await fails(
      await rewrite('key.safetensors', (t) => ({ ...t, name: t.name.replace('.to_q.', '.to_qq.') })),
      /to_qq\.lora_A\.weight'.*nearest is 'transformer_blocks\.0\.attn\.to_q'/,
    )
    const text = 'lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight'
    const beside = (t: TensorToWrite): TensorToWrite[] => (t.name === name ? [t, { ...t, name: text }] : [t])
    await fails(await rewrite('text.safetensors', beside), /lora_te1_text_model/)
  })

  test('the kind of key that it does not know', async () => {
    const scale = name.replace('lora_A.weight', 'dora_scale')
    const beside = (t: TensorToWrite): TensorToWrite[] => (t.name === name ? [t, { ...t, name: scale }] : [t])
    await fails(await rewrite('dora.safetensors', beside), /dora_scale'.*another kind of key/)
    const path = join(folder, 'weights.safetensors')
    await writeSafetensors(path, [
      { name: 'proj_out.weight', dtype: 'F32', shape: [1], data: new Float32Array(1) },
    ])
    await fails(path, /'proj_out\.weight'.*lora_A/)
    await writeSafetensors(path, [])
    await fails(path, /no tensors/)
  })

  test('half a pair, a shape that does not fit, or two pairs for a layer', async () => {
    await fails(
      await rewrite('half.safetensors', (t) => (t.name === name ? [] : t)),
      /to_q\.lora_B\.weight'.*no A/,
    )
    await fails(
      await rewrite('wide.safetensors', only(name, { shape: [3, 31], data: new Float32Array(93) })),
      /to_q\.lora_A\.weight': expected \[rank, 32\], received \[3, 31\]/,
    )
    await fails(
      await rewrite('rank.safetensors', only(name, { shape: [2, 32], data: new Float32Array(64) })),
      /to_q\.lora_B\.weight': expected \[32, 2\], received \[32, 3\]/,
    )
    const twice = (t: TensorToWrite): TensorToWrite[] => [
      t,
      { ...t, name: t.name.replace('transformer.', 'dit.') },
    ]
    await fails(await rewrite('twice.safetensors', twice), /two spellings/)
  })

  test('values that are not finite, and adapters of another kind', async () => {
    const nan = only(name, { data: new Float32Array(96).fill(Number.NaN) })
    await fails(await rewrite('nan.safetensors', nan), /to_q\.lora_A\.weight': expected finite values/)
    const metadata = { lora_adapter_metadata: JSON.stringify({ 'transformer.use_dora': true }) }
    await fails(await rewrite('kind.safetensors', (t) => t, metadata), /use_dora/)
  })

  test('where a file was cut off, or that there is none', async () => {
    const path = await rewrite('cut.safetensors', (t) => t)
    truncateSync(path, statSync(path).size - 100)
    await fails(path, /cut\.safetensors/)
    truncateSync(path, 6)
    await fails(path, /cut off/)
    writeFileSync(path, 'no safetensors at all')
    await fails(path, /header/)
    await fails(join(folder, 'nothing.safetensors'), /nothing\.safetensors/, 'ERR_IO')
  })
})

describe.each(['flux', 'mmdit'] as const)('adapters of the %s network', (family) => {
  const make = async (dtype: 'f32' | 'bf16', seed: number): Promise<string> => {
    const network = FAMILIES[family]('f32')
    const own = Lora.create(network, {
      rank: 1 + seed,
      alpha: 2,
      seed,
      targets: ['attn.to_q', 'attn.to_v', 'to_out.0', 'ff.net.2', 'norm1.linear', 'proj_out'],
    })
    for (const [i, t] of [...own.parameters.values()].entries()) t.write(numbers(t.size, 100 * seed + i, 0.2))
    const path = join(folder, `${family}-${dtype}-${seed}.safetensors`)
    await own.save(path, { dtype })
    own.dispose()
    network.dispose()
    return path
  }

  for (const dtype of ['f32', 'bf16'] as const) {
    test(`blended are the sum of each, and without any the base to the last bit, in ${dtype}`, async () => {
      const network = FAMILIES[family](dtype)
      const [one, two] = [await make(dtype, 1), await make(dtype, 2)]
      const plain = await outputs(network)
      const files = linearLayers(network)
      // The sum, made by hand in double precision and added to the weights.
      const summed = FAMILIES[family]('f32')
      for (const [path, scale] of [
        [one, 0.7],
        [two, -0.4],
      ] as const) {
        for (const [name, { rank, alpha, inputs, outputs: n, read }] of (await openAdapter(path, files))
          .layers) {
          const { a, b } = read()
          const weight = summed.parameters.get(`${name}.weight`)!
          const w = await weight.floats()
          for (let i = 0; i < n; i++) {
            for (let j = 0; j < inputs; j++) {
              let sum = 0
              for (let r = 0; r < rank; r++) sum += b[i * rank + r]! * a[r * inputs + j]!
              w[i * inputs + j]! += (scale * alpha * sum) / rank
            }
          }
          weight.write(w)
        }
      }
      const both = await blended(network, [
        { path: one, scale: 0.7 },
        { path: two, scale: -0.4 },
      ])
      expect(relativeL2(both, await outputs(summed))).toBeLessThan(TOLERANCE[dtype])
      expect(relativeL2(both, plain)).toBeGreaterThan(0.05)
      expect(
        await blended(network, [
          { path: one, scale: 0 },
          { path: two, scale: 0 },
        ]),
      ).toEqual(plain)
      expect(await blended(network, [])).toEqual(plain)
      expect(await outputs(network)).toEqual(plain)
      const alone = await blended(network, [{ path: one, scale: 0.7 }])
      expect(
        await blended(network, [
          { path: one, scale: 0.7 },
          { path: two, scale: 0 },
        ]),
      ).toEqual(alone)
      network.dispose()
      summed.dispose()
    })
  }
})

describe('merging', () => {
  const files = (dir: string): string[] =>
    readdirSync(dir, { recursive: true, withFileTypes: true })
      .filter((entry) => entry.isFile())
      .map((entry) => join(entry.parentPath, entry.name).slice(dir.length + 1))
      .sort()
  const hashOf = (path: string): string => createHash('sha256').update(readFileSync(path)).digest('hex')
  const model = join(folder, 'model')
  const transformer = 'diffusion_transformer'
  let adapter: string
  let call: TransformerInputs

  beforeAll(async () => {
    await writePipeline(model)
    const network = await loadVelocityNetwork(join(model, transformer), { pack: false })
    const own = Lora.create(network, { rank: 2, seed: 4 })
    scramble(own.parameters, 0.3)
    adapter = join(folder, 'adapter.safetensors')
    await own.save(adapter)
    own.dispose()
    network.dispose()
    const random = (shape: number[], seed: number): Tensor =>
      Tensor.from(
        numbers(
          shape.reduce((a, b) => a * b),
          seed,
        ),
        shape,
      )
    call = {
      columns: [[random([1, 16, 1, 4, 4], 1)]],
      timesteps: [300],
      text: random([1, 6, 12], 2),
      pooled: random([1, 12], 3),
    }
  })

  test('writes a model folder that gives what the adapter gives, and leaves the base as it was', async () => {
    const before = files(model).map((name) => hashOf(join(model, name)))
    const out = join(folder, 'merged')
    await mergeAdapters(model, [{ path: adapter, scale: 0.8 }], out)
    expect(files(out)).toEqual(files(model))
    expect(files(model).map((name) => hashOf(join(model, name)))).toEqual(before)
    const [network, merged] = [
      await loadVelocityNetwork(join(model, transformer)),
      await loadVelocityNetwork(join(out, transformer)),
    ]
    const own = await blendAdapters(network, await openAdapters(network, [{ path: adapter, scale: 0.8 }]))
    const expected = await outputs(own.network, call)
    expect(relativeL2(await outputs(merged, call), expected)).toBeLessThan(TOLERANCE.f32)
    expect(relativeL2(await outputs(network, call), expected)).toBeGreaterThan(0.01)
    own.dispose()

    // And back again.
    const back = join(folder, 'back')
    await mergeAdapters(out, [{ path: adapter, scale: -0.8 }], back)
    const unmerged = await loadVelocityNetwork(join(back, transformer))
    expect(relativeL2(await outputs(unmerged, call), await outputs(network, call))).toBeLessThan(
      TOLERANCE.f32,
    )
    for (const made of [network, merged, unmerged]) made.dispose()
  })

  test('keeps the type of the weights', async () => {
    const half = join(folder, 'half')
    const network = await loadVelocityNetwork(join(model, transformer), { dtype: 'bf16' })
    await writePipeline(half)
    await network.save(join(half, transformer))
    const out = join(folder, 'half-merged')
    await mergeAdapters(half, [{ path: adapter }], out)
    const { entries } = openSafetensors(join(out, transformer, 'diffusion_pytorch_model.safetensors'))
    expect([...new Set([...entries.values()].map(({ dtype }) => dtype))]).toEqual(['BF16'])
    const merged = await loadVelocityNetwork(join(out, transformer), { dtype: 'bf16' })
    const own = await blendAdapters(network, await openAdapters(network, [{ path: adapter }]))
    expect(relativeL2(await outputs(merged, call), await outputs(own.network, call))).toBeLessThan(
      TOLERANCE.bf16,
    )
    for (const made of [own, network, merged]) made.dispose()
  })

  test('refuses a name that is taken, and leaves nothing behind when it fails', async () => {
    await expect(mergeAdapters(model, [{ path: adapter }], model)).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/a name that is free/),
    })
    const out = join(folder, 'failed')
    const before = await live()
    await expect(mergeAdapters(model, [{ path: saved }], out)).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
    })
    const aborted = AbortSignal.abort()
    await expect(mergeAdapters(model, [{ path: adapter }], out, { signal: aborted })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    })
    expect(existsSync(out)).toBe(false)
    expect(readdirSync(folder).filter((name) => name.startsWith('.'))).toEqual([])
    expect(await live()).toBe(before)
  })
})
