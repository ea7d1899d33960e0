import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { makeStages } from '../lib/flow/stages.ts'
import { verifyFolder } from '../lib/golden/verify.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { embedding } from '../lib/ops/embedding.ts'
import { sampleLatents, seededNoise } from '../lib/sample.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { scope } from '../lib/tensor/scope.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { goldenFolder } from './golden.ts'

// The kernels of the CUDA backend, run on the host by the emulator, behind the same engine: what can be known of them
// without a GPU. Their op cases run with the other native ones.
engine.configure({ backend: 'cuda_emulated', maxMemory: 1 << 30 })

describe('the CUDA backend in its emulator', () => {
  it('is what computes', () => {
    expect(engine.device.backend).toBe('cuda_emulated')
  })

  // A transformer forward, one packed with gradients and its loss, a jump between stages, a decoded clip.
  it.each(['dit_flux_b_single', 'train_loss_flux_b', 'stage_jump', 'vae_a_decode'])(
    'gives the numbers of the reference: %s',
    async (filter) => {
      const results = await verifyFolder(goldenFolder, { filter })
      expect(results.map(({ name, status }) => [name, status])).toEqual([[filter, 'passed']])
      expect(results[0]?.checks.length).toBeGreaterThan(0)
    },
    180_000,
  )

  it('computes in bf16 on tensor-core instructions', async () => {
    const results = await verifyFolder(goldenFolder, { filter: 'dit_flux_b_single', dtype: 'bf16' })
    expect(results.map(({ status }) => status)).toEqual(['passed'])
  }, 180_000)

  it('tells of an index that only the device can see, and works on', async () => {
    const table = new Generator(1).normal([4, 8])
    const bad = embedding(table, Tensor.from(Int32Array.of(1, 4)))
    await expect(bad.read()).rejects.toMatchObject({
      code: 'ERR_SHAPE',
      message: expect.stringMatching(/embedding: an index lies outside its table/),
    })
    const good = embedding(table, Tensor.from(Int32Array.of(3)))
    expect(Array.from(await good.read())).toEqual(Array.from(await table.read()).slice(24))
  })

  it('refuses what does not fit with a typed error, and works on', async () => {
    await expect(Tensor.zeros([1 << 29]).read()).rejects.toMatchObject({ code: 'ERR_MEMORY' })
    expect(Array.from(await Tensor.zeros([2]).read())).toEqual([0, 0])
  })

  it('lets weights out of memory, and reads them again to the same bits', async () => {
    const dir = join(goldenFolder, 'models', 'flux_b', 'diffusion_transformer_384p')
    const run = async (offload?: 'absent'): Promise<{ bytes: number; values: number[] }> => {
      const before = await live()
      const network = await PyramidFluxTransformer.fromPretrained(dir, { dtype: 'bf16', offload })
      const bytes = (await live()) - before
      const { joint_attention_dim: wide, pooled_projection_dim: pooled } = network.config
      const draw = (shape: readonly number[]): Tensor => new Generator(1).normal(shape)
      const velocity = scope(() =>
        network.forward({
          columns: [[draw([1, 16, 1, 4, 4])]],
          timesteps: [500],
          text: draw([1, 3, wide]),
          pooled: draw([1, pooled]),
        }),
      )
      const values = Array.from(await (velocity[0] as Tensor).floats())
      for (const v of velocity) v.dispose()
      const { offload: away } = network
      if (away) expect([away.absent, await live()]).toEqual([true, before + bytes])
      network.dispose()
      return { bytes, values }
    }
    const [there, away] = [await run(), await run('absent')]
    expect(away.values).toEqual(there.values)
    expect(away.values.every((v) => Number.isFinite(v) && v !== 0)).toBe(true)
    expect(away.bytes).toBeLessThan(0.2 * there.bytes)
  }, 180_000)

  it.each(['f32', 'bf16'] as const)(
    'repeats the steps of a stage as one graph, to the same bits, in %s',
    async (dtype) => {
      const dir = join(goldenFolder, 'models', 'flux_b', 'diffusion_transformer_384p')
      const network = await PyramidFluxTransformer.fromPretrained(dir, { dtype })
      const { joint_attention_dim: wide, pooled_projection_dim: pooled } = network.config
      const draw = (shape: readonly number[]): Tensor => new Generator(1).normal(shape)
      const text = { embeds: draw([1, 3, wide]), mask: [[1, 1, 0]], pooled: draw([1, pooled]) }
      const sample = async (repeat: boolean): Promise<Float32Array[]> => {
        const options = {
          ...{ stages: makeStages(), frames: 2, height: 8, width: 8, text, repeat, historyCache: 2 },
          ...{ steps: [3, 1, 2], videoSteps: [1, 1, 4], noise: seededNoise(new Generator(5)) },
          guidance: { guidanceScale: 1, videoGuidanceScale: 1 },
        }
        const units: Float32Array[] = []
        for await (const event of sampleLatents(network, options)) {
          if (event.type !== 'unit') continue
          units.push(await event.latent.floats())
          event.latent.dispose()
        }
        return units
      }
      const repeated = await sample(true)
      expect(repeated).toEqual(await sample(false))
      expect(repeated.map((values) => values.every(Number.isFinite))).toEqual([true, true])
      network.dispose()
    },
    180_000,
  )

  it('leaves nothing behind', async () => {
    await engine.idle()
    const before = engine.memory().live
    for (let i = 0; i < 100; i++) scope(() => void new Generator(i).normal([64, 64]))
    await engine.idle()
    expect(engine.memory().live).toBe(before)
  })
})
