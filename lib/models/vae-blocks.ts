import type { Weights } from '../nn/weights.ts'
import { attention } from '../ops/attention.ts'
import { conv3d } from '../ops/conv3d.ts'
import { permute, reshape, slice } from '../ops/copy.ts'
import { groupNorm } from '../ops/group-norm.ts'
import { linear } from '../ops/matmul.ts'
import { add } from '../ops/pointwise.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** A layer on channels-last video [B, T, H, W, C]. */
export type Layer = (x: Tensor) => Tensor
type Triple = readonly [number, number, number]

// Published widths start from std 0.02 (spec/vae.md §8); narrow layers would fade out with it, so they get 1/√fan-in.
const initFor = (fanIn: number): { truncNormal: number } => ({
  truncNormal: Math.max(0.02, 1 / Math.sqrt(fanIn)),
})

/** Causal convolution: kt − 1 zero frames in front, k//2 zeros around (spec/vae.md (1)). */
export function causalConv(
  w: Weights,
  cin: number,
  cout: number,
  kernel: number,
  stride: Triple = [1, 1, 1],
): Layer {
  const conv = w.sub('conv')
  const weight = conv.get('weight', [cout, cin, kernel, kernel, kernel], initFor(cin * kernel ** 3))
  const bias = conv.get('bias', [cout], 'zeros')
  const half = kernel >> 1
  return (x) => conv3d(x, weight, bias, { stride, pad: [kernel - 1, half, half] })
}

/** Group norm with per-frame statistics (2), optionally followed by SiLU. */
export function frameNorm(w: Weights, channels: number, groups: number, silu: boolean): Layer {
  const weight = w.get('weight', [channels], 'ones')
  const bias = w.get('bias', [channels], 'zeros')
  return (x) => {
    const [b, t, h, wd] = x.shape as [number, number, number, number]
    const frames = reshape(x, [b * t, h * wd, channels])
    return reshape(groupNorm(frames, weight, bias, { groups, eps: 1e-6, silu }), x.shape)
  }
}

/** Two normalised convolutions and a shortcut (3). */
export function resBlock(w: Weights, cin: number, cout: number, groups: number): Layer {
  const norm1 = frameNorm(w.sub('norm1'), cin, groups, true)
  const conv1 = causalConv(w.sub('conv1'), cin, cout, 3)
  const norm2 = frameNorm(w.sub('norm2'), cout, groups, true)
  const conv2 = causalConv(w.sub('conv2'), cout, cout, 3)
  const shortcut = cin === cout ? undefined : causalConv(w.sub('conv_shortcut'), cin, cout, 1)
  return (x) => add(conv2(norm2(conv1(norm1(x)))), shortcut ? shortcut(x) : x)
}

/** Single-head attention inside each frame (4). */
export function frameAttention(w: Weights, channels: number, groups: number): Layer {
  const norm = frameNorm(w.sub('group_norm'), channels, groups, false)
  const projection = (name: string): Layer => {
    const p = w.sub(name)
    const weight = p.get('weight', [channels, channels], initFor(channels))
    const bias = p.get('bias', [channels], 'zeros')
    return (x) => linear(x, weight, bias)
  }
  const toQ = projection('to_q')
  const toK = projection('to_k')
  const toV = projection('to_v')
  const toOut = projection('to_out.0')
  return (x) => {
    const [b, t, h, wd] = x.shape as [number, number, number, number]
    const frames = [b * t, h * wd, 1, channels]
    const g = norm(x)
    const o = attention(reshape(toQ(g), frames), reshape(toK(g), frames), reshape(toV(g), frames), {})
    return add(toOut(reshape(o, x.shape)), x)
  }
}

/** ResBlock, frame attention, ResBlock. */
export function midBlock(
  w: Weights,
  channels: number,
  groups: number,
  capture: (name: string, x: Tensor) => Tensor,
): Layer {
  const first = resBlock(w.sub('resnets.0'), channels, channels, groups)
  const attend = frameAttention(w.sub('attentions.0'), channels, groups)
  const second = resBlock(w.sub('resnets.1'), channels, channels, groups)
  return (x) => second(capture('attentions.0', attend(first(x))))
}

/** Convolution c → 4c, then channel ch·4 + py·2 + px becomes pixel (2y + py, 2x + px) (5). */
export function spatialUp(w: Weights, channels: number): Layer {
  const conv = causalConv(w.sub('conv'), channels, 4 * channels, 3)
  return (x) => {
    const [b, t, h, wd] = x.shape as [number, number, number, number]
    const split = reshape(conv(x), [b * t, h, wd, channels, 2, 2])
    return reshape(permute(split, [0, 1, 4, 2, 5, 3]), [b, t, 2 * h, 2 * wd, channels])
  }
}

/** Convolution c → 2c, then channel ch·2 + p becomes frame 2t + p; a clip's start loses its first frame (6). */
export function temporalUp(w: Weights, channels: number): (x: Tensor, initial: boolean) => Tensor {
  const conv = causalConv(w.sub('conv'), channels, 2 * channels, 3)
  return (x, initial) => {
    const [b, t, h, wd] = x.shape as [number, number, number, number]
    const split = reshape(conv(x), [b, t, h * wd, channels, 2])
    const doubled = reshape(permute(split, [0, 1, 4, 2, 3]), [b, 2 * t, h, wd, channels])
    return initial ? slice(doubled, 1, 1, 2 * t - 1) : doubled
  }
}
