import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { rehearse } from '../lib/engine/rehearsal.ts'
import { CausalVideoVAE } from '../lib/models/causal-vae.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { PyramidDiffusionMMDiT } from '../lib/models/dit-mmdit.ts'
import { Pipeline } from '../lib/pipeline.ts'
import type { Plan } from '../lib/plan.ts'
import { planFolder } from '../lib/plan-folder.ts'
import { measureRates } from '../lib/plan-seconds.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { tinyText, writePipeline } from './fixtures/tiny.ts'

const PROMPT = 'a red circle'
const folder = mkdtempSync(join(tmpdir(), 'plan-'))
const model = join(folder, 'model')

beforeAll(() => writePipeline(model))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

type Dtype = 'f32' | 'bf16'

/** Networks of published form, wide enough that activations outweigh what kernels borrow. */
function small(dtype: Dtype, kind: 'flux' | 'mmdit' = 'flux'): Pipeline {
  const sizes = { num_attention_heads: 4, attention_head_dim: 32, joint_attention_dim: 12, pooled_projection_dim: 12 }
  const transformer =
    kind === 'flux'
      ? PyramidFluxTransformer.create(
          { ...sizes, num_layers: 1, num_single_layers: 2, axes_dims_rope: [8, 12, 12] },
          { seed: 1, dtype },
        )
      : PyramidDiffusionMMDiT.create({ ...sizes, num_layers: 2 }, { seed: 1, dtype })
  const widths = [16, 32, 32, 32]
  const vae = CausalVideoVAE.create(
    {
      encoder_block_out_channels: widths,
      encoder_layers_per_block: [1, 1, 1, 1],
      encoder_norm_num_groups: 4,
      decoder_block_out_channels: widths,
      decoder_layers_per_block: [1, 1, 1, 1],
      decoder_norm_num_groups: 4,
    },
    { generator: new Generator(1), dtype },
  )
  const constants = { shift: 0, scale: 1 }
  return new Pipeline({
    ...{ transformer, vae, text: tinyText(), dtype },
    config: { normalisation: { image: constants, video: constants }, steps: [1, 1, 1], videoSteps: [1, 1, 1] },
  })
}

/** Most bytes, beside the weights, while the last unit is denoised and while frames are decoded. */
async function measured(
  pipe: Pipeline,
  options: { width: number; height: number; frames: number; maxMemory?: number },
): Promise<{ denoise: number; decode: number }> {
  await engine.idle()
  const weights = engine.memory().live
  engine.resetPeak()
  const peak = async (): Promise<number> => {
    await engine.idle()
    const bytes = engine.memory().peak - weights
    engine.resetPeak()
    return bytes
  }
  let denoise = 0
  let decode = 0
  for await (const event of pipe.generate({ prompt: PROMPT, ...options })) {
    const bytes = await peak()
    if (event.type === 'progress') denoise = bytes
    if (event.type === 'frames') decode = Math.max(decode, bytes)
  }
  return { denoise, decode }
}

const close = (planned: number, real: number): void => {
  expect(planned / real, `planned ${planned}, measured ${real}`).toBeGreaterThan(0.9)
  expect(planned / real, `planned ${planned}, measured ${real}`).toBeLessThan(1.1)
}

describe('a plan', () => {
  const sizes = [
    { width: 128, height: 128, frames: 1 },
    { width: 192, height: 128, frames: 17 },
    { width: 256, height: 192, frames: 25 },
  ]
  for (const dtype of ['f32', 'bf16'] as const) {
    test(`knows the memory of denoising and decoding to a tenth, in ${dtype}`, async () => {
      const pipe = small(dtype)
      for (const size of sizes) {
        const { bytes } = pipe.plan(size)
        const real = await measured(pipe, size)
        close(bytes.denoise, real.denoise)
        close(bytes.decode, real.decode)
      }
      pipe.dispose()
    })
  }

  test('knows it of the SD3 variant, and of decoding in pieces', async () => {
    const pipe = small('f32', 'mmdit')
    const size = { width: 256, height: 192, frames: 17 }
    close(pipe.plan(size).bytes.denoise, (await measured(pipe, size)).denoise)
    const whole = pipe.plan(size).bytes.decode
    const tight = { ...size, maxMemory: Math.round(0.6 * whole) }
    const plan = pipe.plan(tight)
    expect(plan.pieces.tile ?? plan.pieces.window).not.toBeNull()
    expect(plan.bytes.decode).toBeLessThan(tight.maxMemory)
    close(plan.bytes.decode, (await measured(pipe, tight)).decode)
    pipe.dispose()
  })
})
