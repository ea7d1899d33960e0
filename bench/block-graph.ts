import type { Attribute, Constant, Graph, Node } from './onnx.ts'
import { noise } from './peers.ts'

/** Sizes of a network of a two-stream and a one-stream block. */
export interface BlockSizes {
  readonly latent: number
  readonly text: number
  readonly textDim: number
  readonly pooledDim: number
  readonly heads: number
  readonly headDim: number
}

// The flux variant (spec/dit-flux.md §5-7) with one double and one single block, in ONNX's operators and onnxruntime's own.
// The modulation of LN(x)·(1 + scale) + shift is LayerNormalization's scale and bias, which saves it two passes. Every layer
// has weights of its own, as in any network: shared ones would stay in a cache.
class Builder {
  readonly nodes: Node[] = []
  readonly constants: Record<string, Constant> = {}
  readonly #sizes: BlockSizes
  readonly #values = new Map<number, Float32Array>()
  #count = 0

  constructor(sizes: BlockSizes) {
    this.#sizes = sizes
  }

  get width(): number {
    return this.#sizes.heads * this.#sizes.headDim
  }

  op(
    op: string,
    inputs: readonly string[],
    attributes: Record<string, Attribute> = {},
    domain?: string,
  ): string {
    const output = `t${this.#count++}`
    this.nodes.push({ op, inputs, outputs: [output], attributes, ...(domain && { domain }) })
    return output
  }

  own(op: string, inputs: readonly string[], attributes: Record<string, Attribute> = {}): string {
    return this.op(op, inputs, attributes, 'com.microsoft')
  }

  constant(...shape: number[]): string {
    const name = `c${this.#count++}`
    const fanIn = shape.length > 1 ? (shape[0] as number) : 100
    const count = shape.reduce((a, b) => a * b, 1)
    // The same numbers in all of a size: drawing hundreds of megabytes takes longer than the measurement.
    const data = this.#values.get(count) ?? noise(count, count, 1 / Math.sqrt(fanIn))
    this.#values.set(count, data)
    this.constants[name] = { shape, data }
    return name
  }

  whole(name: string, values: readonly number[]): string {
    this.constants[name] ??= { shape: [values.length], data: BigInt64Array.from(values, BigInt) }
    return name
  }

  linear(x: string, from: number, to: number): string {
    return this.op('Add', [this.op('MatMul', [x, this.constant(from, to)]), this.constant(to)])
  }

  silu(x: string): string {
    return this.op('Mul', [x, this.op('Sigmoid', [x])])
  }

  /** Shift, scale and gate vectors [d] of the condition e [1, d]. */
  modulation(e: string, parts: number): string[] {
    const d = this.width
    const all = this.op('Reshape', [this.linear(e, d, parts * d), this.whole(`all${parts}`, [parts * d])])
    return Array.from({ length: parts }, (_, i) => this.rows(all, i * d, (i + 1) * d, 0))
  }

  modulated(x: string, shift: string | undefined, scale: string | undefined): string {
    const inputs = [x, scale as string, shift as string]
    return this.op('LayerNormalization', inputs, { axis: 2, epsilon: { float: 1e-6 } })
  }

  gatedAdd(x: string, y: string, gate: string | undefined): string {
    return this.op('Add', [x, this.op('Mul', [y, gate as string])])
  }

  /** Time and pooled text as one condition [1, d]. */
  condition(time: string, pooled: string): string {
    const d = this.width
    const [a, b] = [this.linear(time, 256, d), this.linear(pooled, this.#sizes.pooledDim, d)]
    return this.silu(
      this.op(
        'Add',
        [a, b].map((x) => this.linear(this.silu(x), d, d)),
      ),
    )
  }

  /** Projection, RMS norm of each head and, for latent tokens, rotation: [1, L, d]. */
  query(x: string, length: number, rotated: boolean): string {
    const { heads, headDim } = this.#sizes
    const d = this.width
    const split = this.op('Reshape', [
      this.linear(x, d, d),
      this.whole(`split${length}`, [1, length, heads, headDim]),
    ])
    const normed = this.op('SimplifiedLayerNormalization', [split, this.constant(headDim)], {
      axis: 3,
      epsilon: { float: 1e-6 },
    })
    const flat = this.op('Reshape', [normed, this.whole(`flat${length}`, [1, length, d])])
    if (!rotated) return flat
    const [cos, sin] = [this.constant(length, headDim / 2), this.constant(length, headDim / 2)]
    return this.own('RotaryEmbedding', [flat, this.whole('zero', [0]), cos, sin], {
      interleaved: 1,
      num_heads: heads,
    })
  }

  attention(q: string, k: string, v: string): string {
    return this.own('MultiHeadAttention', [q, k, v], { num_heads: this.#sizes.heads })
  }

  feedForward(x: string): string {
    const d = this.width
    const up = this.own('FastGelu', [this.op('MatMul', [x, this.constant(d, 4 * d)]), this.constant(4 * d)])
    return this.linear(up, 4 * d, d)
  }

  rows(x: string, from: number, to: number, axis = 1): string {
    const [begin, end] = [this.whole(`n${from}`, [from]), this.whole(`n${to}`, [to])]
    return this.op('Slice', [x, begin, end, this.whole(`axis${axis}`, [axis])])
  }
}

/** The graph: patches [1, latent, 64], text, time features [1, 256] and pooled text → velocities [1, latent, 64]. */
export function blockGraph(sizes: BlockSizes): Graph {
  const { latent, text, textDim, pooledDim } = sizes
  const b = new Builder(sizes)
  const d = b.width
  const both = (p: string, q: string): string => b.op('Concat', [p, q], { axis: 1 })

  const e = b.condition('time', 'pooled')
  const [x, c] = [b.linear('patches', 64, d), b.linear('text', textDim, d)]
  const [mx, mc] = [b.modulation(e, 6), b.modulation(e, 6)]
  const [xn, cn] = [b.modulated(x, mx[0], mx[1]), b.modulated(c, mc[0], mc[1])]
  const [q, k] = [0, 1].map(() => both(b.query(cn, text, false), b.query(xn, latent, true))) as [
    string,
    string,
  ]
  const o = b.attention(q, k, both(b.linear(cn, d, d), b.linear(xn, d, d)))
  const x1 = b.gatedAdd(x, b.linear(b.rows(o, text, text + latent), d, d), mx[2])
  const c1 = b.gatedAdd(c, b.linear(b.rows(o, 0, text), d, d), mc[2])
  const x2 = b.gatedAdd(x1, b.feedForward(b.modulated(x1, mx[3], mx[4])), mx[5])
  const c2 = b.gatedAdd(c1, b.feedForward(b.modulated(c1, mc[3], mc[4])), mc[5])

  const z = both(c2, x2)
  const mz = b.modulation(e, 3)
  const zn = b.modulated(z, mz[0], mz[1])
  const [zq, zk] = [0, 1].map(() => b.query(zn, text + latent, true)) as [string, string]
  const attended = b.attention(zq, zk, b.linear(zn, d, d))
  const up = b.own('FastGelu', [b.op('MatMul', [zn, b.constant(d, 4 * d)]), b.constant(4 * d)])
  const joined = b.linear(b.op('Concat', [attended, up], { axis: 2 }), 5 * d, d)
  const last = b.rows(b.gatedAdd(z, joined, mz[2]), text, text + latent)
  const [scale, shift] = b.modulation(e, 2)
  const out = b.linear(b.modulated(last, shift, scale), d, 64)
  return {
    nodes: b.nodes,
    constants: b.constants,
    inputs: {
      ...{ patches: [1, latent, 64], text: [1, text, textDim] },
      ...{ time: [1, 256], pooled: [1, pooledDim] },
    },
    outputs: { [out]: [1, latent, 64] },
  }
}

/** A causal convolution of the VAE's decoder, channels first as onnxruntime wants them. */
export function convGraph(frames: number, height: number, width: number, channels: number): Graph {
  const shape = [channels, channels, 3, 3, 3]
  const count = shape.reduce((a, b) => a * b, 1)
  return {
    nodes: [
      { op: 'Conv', inputs: ['x', 'w', 'b'], outputs: ['y'], attributes: { pads: [2, 1, 1, 0, 1, 1] } },
    ],
    constants: {
      w: { shape, data: noise(count, 1, 0.02) },
      b: { shape: [channels], data: noise(channels, 2) },
    },
    inputs: { x: [1, channels, frames, height, width] },
    outputs: { y: [1, channels, frames, height, width] },
  }
}
