import { attention, type QueryKeyNorm } from '../ops/attention.ts'
import { concat, reshape, slice } from '../ops/copy.ts'
import { rope } from '../ops/rope.ts'
import { scope } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'
import { type Linear, linearLayer } from './linear.ts'
import type { Weights } from './weights.ts'

/** The part of a packed layout that a network needs; text tokens come before latent tokens. */
export interface TokenLayout {
  readonly latentTokens: number
  readonly textTokens: number
  /** Conditioning row of every token that is computed, text first. */
  readonly jointRows: Int32Array
  /**
   * Token i sees token j iff their segments agree and order[i] ≥ order[j]. Behind the tokens that are computed may come
   * others that they see.
   */
  readonly segment: Int32Array
  readonly order: Int32Array
  /** Rotation of every token, [tokens, D/2]. */
  readonly jointCos: Float32Array
  readonly jointSin: Float32Array
}

/** Of one attention, [tokens, d] each. */
export interface KeysAndValues {
  readonly k: Tensor
  readonly v: Tensor
}

/** What the attentions of a call do with them, in the order in which they come. */
export interface PastWriter {
  /** Keeps what is to be seen again of keys and values of all tokens, text first. */
  keep(of: KeysAndValues): void
}
export interface PastReader {
  /** Room for the current tokens, and behind it what they see of the past: history, then text. */
  next(): KeysAndValues
  /** Latent tokens, which are in front of text. */
  readonly latents: number
}

/** A layout's arrays in native memory; those of the parts are views of the joint ones. */
export interface TokenArrays {
  readonly textTokens: number
  readonly latentTokens: number
  readonly textRows: Tensor
  readonly latentRows: Tensor
  readonly jointRows: Tensor
  readonly segment: Tensor
  readonly order: Tensor
  readonly latentCos: Tensor
  readonly latentSin: Tensor
  readonly jointCos: Tensor
  readonly jointSin: Tensor
  /** Whether backward will follow, also while a block that it computes again runs first without a tape. */
  readonly recording: boolean
  /** Wants keys and values of every attention of this call. */
  readonly keep?: PastWriter | undefined
  /** Has those of what is not computed in this call: text, and latents before the current ones. */
  readonly past?: PastReader | undefined
  /** Runs part of a block, freeing its intermediate results unless backward will need them. */
  readonly local: <T>(fn: () => T) => T
}

/**
 * Copies a layout into native memory, owned by the surrounding scope. `recording`: whether backward will follow; `past`: what
 * the call does with keys and values of the past.
 */
export function uploadLayout(
  layout: TokenLayout,
  recording: boolean,
  past: Pick<TokenArrays, 'keep' | 'past'> = {},
): TokenArrays {
  const { textTokens, latentTokens } = layout
  const total = layout.segment.length
  const half = layout.jointCos.length / total
  const jointRows = Tensor.from(layout.jointRows)
  const jointCos = Tensor.from(layout.jointCos, [total, half])
  const jointSin = Tensor.from(layout.jointSin, [total, half])
  return {
    textTokens,
    latentTokens,
    jointRows,
    textRows: jointRows.view([textTokens]),
    latentRows: jointRows.view([latentTokens], textTokens),
    segment: Tensor.from(layout.segment, [1, total]),
    order: Tensor.from(layout.order, [1, total]),
    jointCos,
    jointSin,
    latentCos: jointCos.view([latentTokens, half], textTokens * half),
    latentSin: jointSin.view([latentTokens, half], textTokens * half),
    recording,
    ...past,
    local: recording ? (fn) => fn() : scope,
  }
}

/** Sizes and names in which the attentions of the two network families differ. */
export interface AttentionOptions {
  readonly heads: number
  readonly headDim: number
  /** eps of the RMS norms of q and k. */
  readonly eps: number
  /** Prefix of the text norms: `norm_added_` (flux) or `norm_add_` (mmdit). */
  readonly textNorm: string
  /** Whether the text stream goes on after this block. */
  readonly textOutput: boolean
}

// One stream's q, k, v projections with their norms.
interface Projections {
  readonly q: Linear
  readonly k: Linear
  readonly v: Linear
  readonly normQ: Tensor
  readonly normK: Tensor
}

function projections(
  w: Weights,
  names: readonly [string, string, string],
  norm: string,
  width: number,
  headDim: number,
): Projections {
  return {
    q: linearLayer(w.sub(names[0]), width, width),
    k: linearLayer(w.sub(names[1]), width, width),
    v: linearLayer(w.sub(names[2]), width, width),
    normQ: w.get(`${norm}q.weight`, [headDim], 'ones'),
    normK: w.get(`${norm}k.weight`, [headDim], 'ones'),
  }
}

const LATENT_NAMES = ['to_q', 'to_k', 'to_v'] as const
const TEXT_NAMES = ['add_q_proj', 'add_k_proj', 'add_v_proj'] as const

// The fused kernel has no backward. A network that trains does without it always: its bits should not depend on whether
// they are recorded.
const mayFuse = ({ recording }: TokenArrays, ...norms: readonly Tensor[]): boolean =>
  !recording && !norms.some((t) => t.requiresGrad)

function attend(q: Tensor, k: Tensor, v: Tensor, arrays: TokenArrays, norm?: QueryKeyNorm): Tensor {
  const [tokens, heads, headDim] = q.shape as [number, number, number]
  const rows = (t: Tensor): Tensor => reshape(t, [1, -1, heads, headDim])
  const { segment, order } = arrays
  const o = attention(rows(q), rows(k), rows(v), { segment, order, norm })
  return reshape(o, [tokens, heads * headDim])
}

// Keys and values [tokens, d] of the current tokens in front of those of the past.
function withPast(p: Projections, x: Tensor, past: PastReader): KeysAndValues {
  const all = past.next()
  for (const name of ['k', 'v'] as const) p[name](x, { into: all[name].view(x.shape) })
  return all
}

/**
 * Attention of text and latent tokens together, with projections of their own (spec/dit-flux.md §6, §7.1): latent
 * [N, d] and text [T, d] → both after their output projections; the text part is null when the stream ends, or where
 * text is null and its keys and values are kept ones.
 */
export function jointAttention(
  w: Weights,
  options: AttentionOptions,
): (latent: Tensor, text: Tensor | null, arrays: TokenArrays) => [Tensor, Tensor | null] {
  const { heads, headDim, eps } = options
  const width = heads * headDim
  const x = projections(w, LATENT_NAMES, 'norm_', width, headDim)
  const c = projections(w, TEXT_NAMES, options.textNorm, width, headDim)
  const toOut = linearLayer(w.sub('to_out.0'), width, width)
  const toAddOut = options.textOutput ? linearLayer(w.sub('to_add_out'), width, width) : null
  const split = (t: Tensor): Tensor => reshape(t, [-1, heads, headDim])

  // Norms of all tokens on their way in: the first `count` take those of `first`.
  const norms = (first: Projections, then: Projections, count: number, arrays: TokenArrays): QueryKeyNorm => {
    const both = (name: 'normQ' | 'normK') => reshape(concat([first[name], then[name]], 0), [2, headDim])
    const { jointCos: cos, jointSin: sin } = arrays
    return { weightQ: both('normQ'), weightK: both('normK'), cos, sin, eps, split: count }
  }
  const current = (latent: Tensor, past: PastReader, arrays: TokenArrays): Tensor => {
    const { k, v } = withPast(x, latent, past)
    return attend(split(x.q(latent)), split(k), split(v), arrays, norms(x, c, past.latents, arrays))
  }

  return (latent, text, arrays) => {
    const { latentCos: cos, latentSin: sin, textTokens, latentTokens, local, past } = arrays
    if (past) return [toOut(local(() => current(latent, past, arrays))), null]
    if (!text) throw new Error('text is missing')
    const o = local(() => {
      if (mayFuse(arrays, c.normQ, c.normK, x.normQ, x.normK)) {
        // Both projections write where the attention reads: text first.
        const joint = (name: 'q' | 'k' | 'v'): Tensor => {
          const all = Tensor.empty([textTokens + latentTokens, width], latent.dtype)
          c[name](text, { into: all.view([textTokens, width]) })
          x[name](latent, { into: all.view([latentTokens, width], textTokens * width) })
          return all
        }
        const norm = norms(c, x, textTokens, arrays)
        const [k, v] = [joint('k'), joint('v')]
        arrays.keep?.keep({ k, v })
        return attend(split(joint('q')), split(k), split(v), arrays, norm)
      }
      const pair = (name: 'q' | 'k' | 'v') => [split(c[name](text)), split(x[name](latent))] as const
      const [q, k, v] = [pair('q'), pair('k'), pair('v')]
      // Text lies at position 0, where the rotation is the identity.
      const turned = ([ofText, ofLatent]: readonly [Tensor, Tensor], norm: 'normQ' | 'normK') =>
        concat(
          [rope(ofText, { weight: c[norm], eps }), rope(ofLatent, { weight: x[norm], cos, sin, eps })],
          0,
        )
      return attend(turned(q, 'normQ'), turned(k, 'normK'), concat(v, 0), arrays) // [T + N, d]
    })
    const latentOut = toOut(slice(o, 0, textTokens, latentTokens))
    return [latentOut, toAddOut ? toAddOut(slice(o, 0, 0, textTokens)) : null]
  }
}

/** Attention over the tokens z [T + N, d] with one set of projections and none at the output (spec/dit-flux.md §7.3). */
export function selfAttention(
  w: Weights,
  options: Pick<AttentionOptions, 'heads' | 'headDim' | 'eps'>,
): (z: Tensor, arrays: TokenArrays) => Tensor {
  const { heads, headDim, eps } = options
  const p = projections(w, LATENT_NAMES, 'norm_', heads * headDim, headDim)
  const split = (t: Tensor): Tensor => reshape(t, [-1, heads, headDim])
  return (z, arrays) => {
    const { jointCos: cos, jointSin: sin, local, past } = arrays
    return local(() => {
      const of = past ? withPast(p, z, past) : { k: p.k(z), v: p.v(z) }
      arrays.keep?.keep(of)
      const [q, k, v] = [split(p.q(z)), split(of.k), split(of.v)]
      if (mayFuse(arrays, p.normQ, p.normK)) {
        return attend(q, k, v, arrays, { weightQ: p.normQ, weightK: p.normK, cos, sin, eps })
      }
      const turned = [
        rope(q, { weight: p.normQ, cos, sin, eps }),
        rope(k, { weight: p.normK, cos, sin, eps }),
      ] as const
      return attend(...turned, v, arrays)
    })
  }
}
