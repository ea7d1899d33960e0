import type { Weights } from '../nn/weights.ts'
import { attention } from '../ops/attention.ts'
import { conv3d } from '../ops/conv3d.ts'
import { permute, reshape, slice } from '../ops/copy.ts'
import { groupNorm } from '../ops/group-norm.ts'
import { linear } from '../ops/matmul.ts'
import { add } from '../ops/pointwise.ts'
import { sizeOf, type Tensor } from '../tensor/tensor.ts'
import type { Pass } from './vae-pass.ts'

export type Shape = readonly number[]

/** What a layer takes without a tape, in elements of its type. */
export interface Footprint {
  out: Shape
  /** Most at once, input and output included. */
  peak: number
  /** Carried to the next chunk. */
  past: number
}

/** A layer on channels-last video [B, T, H, W, C]. */
export interface Layer {
  run(x: Tensor, pass: Pass): Tensor
  /** What `run` takes on an input of this shape. */
  footprint(x: Shape, how: Estimate): Footprint
}

export interface Estimate {
  /** Whether frames are carried from chunk to chunk. */
  carry: boolean
  /** Whether the chunk begins its clip. */
  initial: boolean
  /** Elements that a convolution borrows besides its operands, from the shapes of x, w and y. */
  borrowed: (x: Shape, w: Shape, y: Shape) => number
}
type Triple = readonly [number, number, number]

// Published widths start from std 0.02 (spec/vae.md §8); narrow layers would fade out with it, so they get 1/√fan-in.
const initFor = (fanIn: number): { truncNormal: number } => ({
  truncNormal: Math.max(0.02, 1 / Math.sqrt(fanIn)),
})

/** Causal convolution: kt − 1 earlier or zero frames in front, k//2 zeros around (spec/vae.md (1), (9)). */
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
  const seenAgain = Math.max(0, kernel - stride[0])
  const layer: Layer = {
    run: (x, pass) =>
      pass.scoped(() => {
        const { frames, zeros } = pass.withPast(layer, x, kernel, stride[0])
        return conv3d(frames, weight, bias, { stride, pad: [zeros, half, half] })
      }),
    footprint: ([b, t, h, wd], { carry, initial, borrowed }) => {
      const [T, H, W] = [t, h, wd].map((n, i) => Math.ceil((n as number) / (stride[i] as number)))
      const out = [b, T, H, W, cout] as number[]
      const frame = (b as number) * (h as number) * (wd as number) * cin
      const past = carry ? seenAgain * frame : 0
      const input = (t as number) * frame
      const seen = (t as number) + (carry ? seenAgain : 0)
      const own = borrowed([b, seen, h, wd, cin] as number[], weight.shape, out)
      const joined = past && !initial ? input + past : 0
      return { out, peak: input + joined + past + sizeOf(out) + own, past }
    },
  }
  return layer
}

/** Group norm with per-frame statistics (2), optionally followed by SiLU. */
export function frameNorm(w: Weights, channels: number, groups: number, silu: boolean): Layer {
  const weight = w.get('weight', [channels], 'ones')
  const bias = w.get('bias', [channels], 'zeros')
  return {
    run: (x, pass) =>
      pass.scoped(() => {
        const [b, t, h, wd] = x.shape as [number, number, number, number]
        const frames = reshape(x, [b * t, h * wd, channels])
        return reshape(groupNorm(frames, weight, bias, { groups, eps: 1e-6, silu }), x.shape)
      }),
    footprint: (x) => ({ out: x, peak: 2 * sizeOf(x), past: 0 }),
  }
}

/** Two normalised convolutions and a shortcut (3). */
export function resBlock(w: Weights, cin: number, cout: number, groups: number): Layer {
  const branch = [
    frameNorm(w.sub('norm1'), cin, groups, true),
    causalConv(w.sub('conv1'), cin, cout, 3),
    frameNorm(w.sub('norm2'), cout, groups, true),
    causalConv(w.sub('conv2'), cout, cout, 3),
  ]
  const shortcut = cin === cout ? undefined : causalConv(w.sub('conv_shortcut'), cin, cout, 1)
  return {
    run: (x, pass) => {
      let h = x
      for (const layer of branch) {
        const next = layer.run(h, pass)
        if (h !== x) pass.free(h)
        h = next
      }
      const straight = shortcut ? shortcut.run(x, pass) : x
      const y = add(h, straight)
      pass.free(h)
      if (shortcut) pass.free(straight)
      return y
    },
    footprint: (x, how) => {
      const { out, peak, past } = inSeries(branch, x, how)
      // The input stays beside the branch; at the end it, the branch, the shortcut and the sum are there.
      const end = sizeOf(x) + 3 * sizeOf(out) + (shortcut ? 4 * cin * cout : 0)
      return { out, peak: Math.max(peak + sizeOf(x), end), past }
    },
  }
}

/** Single-head attention inside each frame (4). */
export function frameAttention(w: Weights, channels: number, groups: number): Layer {
  const norm = frameNorm(w.sub('group_norm'), channels, groups, false)
  const projection = (name: string): ((x: Tensor) => Tensor) => {
    const p = w.sub(name)
    const weight = p.get('weight', [channels, channels], initFor(channels))
    const bias = p.get('bias', [channels], 'zeros')
    return (x) => linear(x, weight, bias)
  }
  const toQ = projection('to_q')
  const toK = projection('to_k')
  const toV = projection('to_v')
  const toOut = projection('to_out.0')
  return {
    run: (x, pass) =>
      pass.scoped(() => {
        const [b, t, h, wd] = x.shape as [number, number, number, number]
        const frames = [b * t, h * wd, 1, channels]
        const g = norm.run(x, pass)
        const o = attention(reshape(toQ(g), frames), reshape(toK(g), frames), reshape(toV(g), frames), {})
        return add(toOut(reshape(o, x.shape)), x)
      }),
    // Input, norm, q, k, v, their attention and its row sums, the projection and the sum.
    footprint: (x) => ({ out: x, peak: 8 * sizeOf(x) + 2 * sizeOf(x.slice(0, 4)), past: 0 }),
  }
}

/** Convolution c → 4c, then channel ch·4 + py·2 + px becomes pixel (2y + py, 2x + px) (5). */
export function spatialUp(w: Weights, channels: number): Layer {
  const conv = causalConv(w.sub('conv'), channels, 4 * channels, 3)
  return {
    run: (x, pass) =>
      pass.scoped(() => {
        const [b, t, h, wd] = x.shape as [number, number, number, number]
        const split = reshape(conv.run(x, pass), [b * t, h, wd, channels, 2, 2])
        return reshape(permute(split, [0, 1, 4, 2, 5, 3]), [b, t, 2 * h, 2 * wd, channels])
      }),
    footprint: (x, how) => {
      const { peak, past } = conv.footprint(x, how)
      const [b, t, h, wd] = x as [number, number, number, number]
      return { out: [b, t, 2 * h, 2 * wd, channels], peak: Math.max(peak, 9 * sizeOf(x)), past }
    },
  }
}

/** Convolution c → 2c, then channel ch·2 + p becomes frame 2t + p; a clip's start loses its first frame (6). */
export function temporalUp(w: Weights, channels: number): Layer {
  const conv = causalConv(w.sub('conv'), channels, 2 * channels, 3)
  return {
    run: (x, pass) =>
      pass.scoped(() => {
        const [b, t, h, wd] = x.shape as [number, number, number, number]
        const split = reshape(conv.run(x, pass), [b, t, h * wd, channels, 2])
        const doubled = reshape(permute(split, [0, 1, 4, 2, 3]), [b, 2 * t, h, wd, channels])
        return pass.initial ? slice(doubled, 1, 1, 2 * t - 1) : doubled
      }),
    footprint: (x, how) => {
      const { peak, past } = conv.footprint(x, how)
      const [b, t, h, wd] = x as [number, number, number, number]
      // Input, convolution and its permutation, and without its first frame the copy of several clips.
      const copies = how.initial && b > 1 ? 7 : 5
      const frames = how.initial ? 2 * t - 1 : 2 * t
      return { out: [b, frames, h, wd, channels], peak: Math.max(peak, copies * sizeOf(x)), past }
    },
  }
}

/** Layers one after the other: each frees its input. */
export function inSeries(layers: readonly Layer[], x: Shape, how: Estimate): Footprint {
  let out = x
  let peak = 0
  let past = 0
  for (const layer of layers) {
    const next = layer.footprint(out, how)
    out = next.out
    peak = Math.max(peak, next.peak)
    past += next.past
  }
  return { out, peak, past }
}
