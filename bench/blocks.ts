import { engine } from '../lib/engine/engine.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { miniFluxConfig } from '../lib/models/presets.ts'
import { conv3d } from '../lib/ops/conv3d.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { scope } from '../lib/tensor/scope.ts'
import { noGrad } from '../lib/tensor/tape.ts'
import type { Tensor } from '../lib/tensor/tensor.ts'
import { blockGraph, convGraph } from './block-graph.ts'
import {
  type Effort,
  engineSeconds,
  fastBf16,
  hasInt8,
  median,
  type Required,
  type Unnamed,
} from './harness.ts'
import { findOnnxRuntime, INSTALL, onnxPeer, type Peer } from './peers.ts'

const TEXT = 128
const DTYPES = ['bf16', 'f32'] as const

type Dtype = (typeof DTYPES)[number]
// bf16 with products of tokens in eight bits.
type Rounding = Dtype | 'int8'

// What the published network must reach against the same layers in f32 elsewhere.
const BOUNDS: Record<Dtype, number> = { bf16: 4, f32: 1 }

const shortened = (effort: Effort): Effort => ({ ...effort, rounds: effort.quick ? 1 : 3 })

/** One double and one single block at the published width, and convolutions of the decoder, against onnxruntime. */
export async function blocks(effort: Effort): Promise<Unnamed[]> {
  const ort = findOnnxRuntime()
  if (!ort) process.stderr.write(`  no comparison with onnxruntime, which is not installed: ${INSTALL}\n`)
  const heads = effort.quick ? 2 : miniFluxConfig.num_attention_heads
  const rows: Unnamed[] = []
  // Latents of 2·24 × 2·40 and 2·62 × 2·64: with the text 1,088 and 4,096 tokens.
  for (const [y, x] of effort.quick
    ? [[4, 4]]
    : [
        [24, 40],
        [62, 64],
      ]) {
    const latent = (y as number) * (x as number)
    const { joint_attention_dim: textDim, pooled_projection_dim: pooledDim } = miniFluxConfig
    const sizes = { latent, text: TEXT, textDim, pooledDim, heads, headDim: 64 }
    const peer = ort && (await onnxPeer(ort, 'graph of the same network', blockGraph(sizes)))
    for (const dtype of [...DTYPES, ...(hasInt8() ? (['int8'] as const) : [])])
      rows.push(await block(effort, dtype, [2 * (y as number), 2 * (x as number)], heads, peer))
    await peer?.close()
  }
  for (const [frames, h, w, c] of effort.quick
    ? [[2, 8, 8, 16]]
    : [
        [3, 48, 80, 512],
        [2, 192, 320, 128],
      ]) {
    const clip = [frames, h, w, c] as [number, number, number, number]
    const peer = ort && (await onnxPeer(ort, 'Conv', convGraph(...clip)))
    for (const dtype of DTYPES) rows.push(await conv(effort, dtype, clip, peer))
    await peer?.close()
  }
  return rows
}

async function compared(
  effort: Effort,
  what: { name: string; flops: number; dtype: Rounding },
  op: () => Tensor,
  peer: Peer | undefined,
): Promise<Unnamed> {
  const run = (): Tensor => noGrad(() => scope(op))
  const ours = async (): Promise<number> => 1 / (await engineSeconds(run, 1))
  const rate = (perSecond: number): number => 1e-9 * what.flops * perSecond
  if (!peer) return { name: what.name, value: rate(await ours()), unit: 'GFLOP/s' }
  const { dtype } = what
  const bounded = dtype === 'f32' || (dtype === 'bf16' && fastBf16())
  const required = bounded ? { required: { of: 'ratio', atLeast: BOUNDS[dtype] } as Required } : {}
  // By turns and not at once: both take all cores.
  const slices: { our: number; their: number }[] = []
  for (let i = 0; i < shortened(effort).rounds; i++) {
    const our = await ours()
    slices.push({ our, their: 1 / (await peer.seconds(1)) })
  }
  const value = rate(median(slices.map(({ our }) => our)))
  const ratio = median(slices.map(({ our, their }) => our / their))
  return { name: what.name, value, unit: 'GFLOP/s', ratio, against: peer.name, ...required }
}

async function block(
  effort: Effort,
  rounding: Rounding,
  [height, width]: [number, number],
  heads: number,
  peer: Peer | undefined,
): Promise<Unnamed> {
  const config = { ...miniFluxConfig, num_layers: 1, num_single_layers: 1, num_attention_heads: heads }
  const [dtype, quantize] = rounding === 'int8' ? (['bf16', rounding] as const) : [rounding, undefined]
  const model = PyramidFluxTransformer.create(config, { seed: 1, dtype, quantize })
  const generator = new Generator(2)
  const draw = (...shape: number[]): Tensor => generator.normal(shape, { dtype })
  const text = draw(1, TEXT, config.joint_attention_dim)
  const inputs = { columns: [[draw(1, 16, 1, height, width)]], timesteps: [500], text, pooled: draw(1, 768) }
  const layout = model.layout(inputs)
  const tokens = TEXT + (height * width) / 4
  const d = heads * 64
  const flops = 2 * 24 * d ** 2 * tokens + 2 * 4 * tokens ** 2 * d
  try {
    const name = `double and single block, ${tokens} tokens, d = ${d}, ${rounding}`
    return await compared(
      effort,
      { name, flops, dtype: rounding },
      () => model.forward({ ...inputs, layout })[0] as Tensor,
      peer,
    )
  } finally {
    for (const t of [text, inputs.pooled, ...inputs.columns.flat()]) t.dispose()
    model.dispose()
    await engine.idle()
  }
}

async function conv(
  effort: Effort,
  dtype: Dtype,
  [frames, height, width, channels]: [number, number, number, number],
  peer: Peer | undefined,
): Promise<Unnamed> {
  const generator = new Generator(3)
  const x = generator.normal([1, frames, height, width, channels], { dtype })
  const w = generator.normal([channels, channels, 3, 3, 3], { dtype, std: 0.02 })
  const b = generator.normal([channels], { dtype })
  const flops = 2 * 27 * channels ** 2 * frames * height * width
  try {
    const name = `causal 3×3×3 convolution, ${channels} channels, ${frames}×${height}×${width}, ${dtype}`
    return await compared(effort, { name, flops, dtype }, () => conv3d(x, w, b, { pad: [2, 1, 1] }), peer)
  } finally {
    for (const t of [x, w, b]) t.dispose()
  }
}
