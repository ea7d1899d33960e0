import type { DType } from '../lib/engine/engine.ts'
import { downsample } from '../lib/ops/downsample.ts'
import { euler } from '../lib/ops/euler.ts'
import { mix } from '../lib/ops/mix.ts'
import { packTokens } from '../lib/ops/patchify.ts'
import { blockNoise, renoise } from '../lib/ops/renoise.ts'
import { upsample } from '../lib/ops/upsample.ts'
import { Generator } from '../lib/tensor/generator.ts'
import type { Tensor } from '../lib/tensor/tensor.ts'
import {
  bareCopy,
  countFor,
  type Effort,
  engineSeconds,
  interleave,
  median,
  type Required,
  type Unnamed,
} from './harness.ts'
import { naiveBlockNoise } from './naive-noise.ts'

// One frame of a 768p latent, and an array that no cache holds.
const SIZES = [
  { label: '768p latent', channels: 16, h: 96, w: 160 },
  { label: '64 MB', channels: 256, h: 256, w: 256 },
]
const GAMMA = 1 / 3

interface Case {
  name: string
  /** Bytes read and written by the op. */
  moved: number
  op: () => Tensor
  required?: Required
}

/** The ops between networks, which only move memory, against a plain copy that moves as many bytes. */
export async function pyramid(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  for (const { label, channels, h, w } of SIZES) {
    const frames = effort.quick && channels > 16 ? 16 : channels
    for (const dtype of ['f32', 'bf16'] as const) {
      const { cases, owned } = makeCases(dtype, frames, h, w)
      for (const { name, moved, op, required } of cases) {
        const count = await countFor(op, effort.seconds)
        const { ours, ratio } = await interleave(
          effort,
          async () => (1e-9 * moved) / (await engineSeconds(op, count)),
          () => bareCopy(moved, effort.seconds),
        )
        const against = 'memcpy of the same bytes'
        const row: Unnamed = { name: `${name}, ${label} ${dtype}`, value: ours, unit: 'GB/s', ratio, against }
        rows.push(required ? { ...row, required } : row)
      }
      for (const t of owned) t.dispose()
    }
  }
  rows.push(await jumpAgainstDraw(effort), await noiseAgainstNaive(effort))
  return rows
}

/** Inputs and outputs have [channels, h, w] at their larger end. */
function makeCases(dtype: DType, channels: number, h: number, w: number): { cases: Case[]; owned: Tensor[] } {
  const generator = new Generator(1)
  const draw = (shape: number[]): Tensor => generator.normal(shape, { dtype })
  const full = [draw([channels, h, w]), draw([channels, h, w]), draw([channels, h, w])] as const
  const [x, v, u] = full
  const small = draw([channels, h / 2, w / 2])
  const sigma = generator.uniform([channels])
  // Latents have 16 channels; what is more than that is time.
  const clip = x.view([1, 16, channels / 16, h, w])
  const latentTokens = (channels / 16) * (h / 2) * (w / 2)
  const tokens = { latentTokens, columns: [{ clips: [{ rowOffset: 0, rowStride: latentTokens }] }] }
  const bytes = x.bytes
  const noise = { alpha: 1, beta: 0.5, gamma: GAMMA, seed: 1, stream: 2 }
  const required: Required = { of: 'ratio', atLeast: 0.6 }
  return {
    cases: [
      { name: 'downsample', moved: 1.25 * bytes, op: () => downsample(x), required },
      { name: 'upsample', moved: 1.25 * bytes, op: () => upsample(small), required },
      { name: 'renoise, noise drawn', moved: 1.25 * bytes, op: () => renoise(small, noise) },
      {
        name: 'renoise, noise given',
        moved: 2.25 * bytes,
        op: () => renoise(small, { ...noise, noise: v }),
        ...(channels > 16 ? { required } : {}),
      },
      { name: 'mix', moved: 3 * bytes, op: () => mix(x, v, sigma) },
      {
        name: 'euler with guidance',
        moved: 4 * bytes,
        op: () => euler(x, v, u, { deltaSigma: -0.1, guidance: 7 }),
      },
      { name: 'patchify', moved: 2 * bytes, op: () => packTokens([[clip]], tokens) },
    ],
    owned: [...full, small, sigma, clip],
  }
}

/** Making random numbers is arithmetic: a jump with its block noise against drawing as many unit normals alone. */
async function jumpAgainstDraw(effort: Effort): Promise<Unnamed> {
  const shape = effort.quick ? [2, 96, 160] : [16, 96, 160]
  const [channels, h, w] = shape as [number, number, number]
  const small = new Generator(1).normal([channels, h / 2, w / 2])
  const stream = new Generator(3)
  const jump = (): Tensor => renoise(small, { alpha: 1, beta: 0.5, gamma: GAMMA, seed: 1, stream: 2 })
  const draw = (): Tensor => stream.normal(shape)
  const counts = [await countFor(jump, effort.seconds), await countFor(draw, effort.seconds)] as const
  const rate = async (op: () => Tensor, count: number): Promise<number> =>
    (1e-6 * channels * h * w) / (await engineSeconds(op, count))
  const { ours, ratio } = await interleave(
    effort,
    () => rate(jump, counts[0]),
    () => rate(draw, counts[1]),
  )
  small.dispose()
  const against = 'unit normals alone'
  return { name: 'renoise, noise drawn, 768p latent f32', value: ours, unit: 'Mvalues/s', ratio, against }
}

/** Elements a second of the fused kernel against a block-by-block draw in JavaScript. */
async function noiseAgainstNaive(effort: Effort): Promise<Unnamed> {
  const [channels, h, w] = effort.quick ? [2, 96, 160] : [16, 96, 160]
  const elements = channels * h * w
  const op = (): Tensor => blockNoise([channels, h, w], { gamma: GAMMA, seed: 1, stream: 2 })
  const count = await countFor(op, effort.seconds / 4)
  const ours: number[] = []
  const naive: number[] = []
  for (let i = 0; i < effort.rounds; i++) {
    ours.push(elements / (await engineSeconds(op, count)))
    const begin = performance.now()
    naiveBlockNoise(channels, h, w, GAMMA)
    naive.push((1000 * elements) / (performance.now() - begin))
  }
  return {
    name: 'blockNoise, 768p latent f32',
    value: 1e-6 * median(ours),
    unit: 'Mvalues/s',
    ratio: median(ours) / median(naive),
    against: 'block by block in JavaScript',
  }
}
