import { PyraflowError } from '../engine/errors.ts'
import { type Linear, linearLayer } from '../nn/linear.ts'
import { affineNorm } from '../nn/norm.ts'
import type { ComputeType, Weights } from '../nn/weights.ts'
import { attention } from '../ops/attention.ts'
import { reshape } from '../ops/copy.ts'
import { embedding } from '../ops/embedding.ts'
import { add, gelu, quickGelu } from '../ops/pointwise.ts'
import type { Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import {
  type Capture,
  loadNetwork,
  replaceBy,
  TextConfig,
  type TextNetworkOptions,
  tokenTensor,
} from './network.ts'

/** Sizes of a CLIP text model. */
export interface ClipTextConfig {
  readonly width: number
  readonly heads: number
  readonly hidden: number
  readonly layers: number
  readonly vocabulary: number
  /** Longest row of tokens. */
  readonly positions: number
  readonly eps: number
  readonly activation: 'quick_gelu' | 'gelu'
  /** Id of the end of the text; in old configs 2, which stands for the largest id of the row. */
  readonly eos: number
  /** Width of the pooled output after its projection; null without one. */
  readonly projection: number | null
}

const LEGACY_EOS = 2

/** What a config.json calls this network. */
export function clipClasses(projection: boolean): readonly string[] {
  const names = projection ? [] : ['CLIPTextModel']
  return [...names, 'CLIPTextModelWithProjection', 'clip_text_model']
}

/** Every token sees itself and those before it. */
interface CausalMask {
  readonly segment: Tensor
  readonly order: Tensor
}

function causalMask(rows: number, length: number): CausalMask {
  const order = Int32Array.from({ length: rows * length }, (_, i) => i % length)
  return {
    segment: Tensor.from(new Int32Array(rows * length), [rows, length]),
    order: Tensor.from(order, [rows, length]),
  }
}

type Block = (h: Tensor, mask: CausalMask) => Tensor

function clipBlock(w: Weights, c: ClipTextConfig): Block {
  const { width, heads, eps } = c
  const activate = { quick_gelu: quickGelu, gelu }[c.activation]
  const own = w.sub('self_attn')
  const [q, k, v, out] = ['q_proj', 'k_proj', 'v_proj', 'out_proj'].map((name) =>
    linearLayer(own.sub(name), width, width),
  ) as [Linear, Linear, Linear, Linear]
  const norm1 = affineNorm(w.sub('layer_norm1'), width, eps)
  const norm2 = affineNorm(w.sub('layer_norm2'), width, eps)
  const up = linearLayer(w.sub('mlp.fc1'), width, c.hidden)
  const down = linearLayer(w.sub('mlp.fc2'), c.hidden, width)

  return (h, mask) => {
    const split = (t: Tensor): Tensor => reshape(t, [...mask.order.shape, heads, width / heads])
    const x = norm1(h)
    const o = attention(split(q(x)), split(k(x)), split(v(x)), { segment: mask.segment, order: mask.order })
    const attended = out(reshape(o, h.shape), { residual: h })
    return down(activate(up(norm2(attended))), { residual: attended })
  }
}

/** The text half of CLIP, with or without projection (spec/text.md §4). */
export class ClipTextModel {
  readonly config: ClipTextConfig
  readonly dtype: ComputeType
  readonly #weights: Weights
  readonly #tokens: Tensor
  readonly #positions: Tensor
  readonly #blocks: Block[]
  readonly #norm: (x: Tensor) => Tensor
  readonly #project: Linear | null

  private constructor(config: ClipTextConfig, w: Weights) {
    const { width, projection } = config
    this.config = config
    this.dtype = w.dtype
    this.#weights = w
    const text = w.sub('text_model')
    this.#tokens = text.get('embeddings.token_embedding.weight', [config.vocabulary, width])
    this.#positions = text.get('embeddings.position_embedding.weight', [config.positions, width])
    this.#blocks = Array.from({ length: config.layers }, (_, i) =>
      clipBlock(text.sub('encoder.layers').sub(i), config),
    )
    this.#norm = affineNorm(text.sub('final_layer_norm'), width, config.eps)
    this.#project = projection
      ? linearLayer(w.sub('text_projection'), width, projection, 'xavier', false)
      : null
  }

  /** Width of the pooled output. */
  get pooledDim(): number {
    return this.config.projection ?? this.config.width
  }

  /**
   * Loads a published folder.
   *
   * @param options.projection - whether the pooled output goes through `text_projection`
   * @throws ERR_IO when the folder cannot be read; ERR_CHECKPOINT when it holds another network, or one that this
   * class does not compute.
   */
  static async fromPretrained(
    folder: string,
    options: TextNetworkOptions & { readonly projection: boolean },
  ): Promise<ClipTextModel> {
    const { projection, ...rest } = options
    const c = new TextConfig(folder, clipClasses(projection))
    const config: ClipTextConfig = {
      width: c.size('hidden_size'),
      heads: c.size('num_attention_heads'),
      hidden: c.size('intermediate_size'),
      layers: c.size('num_hidden_layers'),
      vocabulary: c.size('vocab_size'),
      positions: c.size('max_position_embeddings'),
      eps: c.eps('layer_norm_eps'),
      activation: c.oneOf('hidden_act', ['quick_gelu', 'gelu']),
      eos: c.size('eos_token_id'),
      projection: projection ? c.size('projection_dim') : null,
    }
    if (config.width % config.heads !== 0) {
      throw c.wrong('num_attention_heads', `a divisor of hidden_size, ${config.width}`)
    }
    const ignored = ['text_model.embeddings.position_ids', ...(projection ? [] : ['text_projection.'])]
    return loadNetwork(folder, rest, (weights) => new ClipTextModel(config, weights), ignored)
  }

  /** Index of the token whose state stands for the whole row. @throws ERR_OPTION when the row has no end. */
  endOf(row: readonly number[]): number {
    const { eos } = this.config
    const end = eos === LEGACY_EOS ? row.indexOf(Math.max(...row)) : row.indexOf(eos)
    if (end >= 0) return end
    throw new PyraflowError('ERR_OPTION', {
      what: 'CLIP: row of tokens',
      expected: `the end mark ${eos}`,
      received: 'none',
      remedy: 'Check that tokenizer and text encoder belong to one model.',
    })
  }

  /**
   * The pooled states [R, pooledDim] of R rows of tokens: those at the end of the text. Pauses after every layer.
   *
   * @throws ERR_SHAPE, ERR_OPTION for rows that differ in length or are too long, an id outside the vocabulary or a row
   * without end
   */
  *forwardSteps(rows: readonly (readonly number[])[], capture?: Capture): Steps<Tensor> {
    const { vocabulary, positions, layers } = this.config
    const length = rows[0]?.length ?? 0
    if (length > positions) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'CLIP',
        expected: `at most ${positions} tokens a row`,
        received: `${length}`,
      })
    }
    const ids = tokenTensor('CLIP', rows, length, vocabulary)
    const ends = Int32Array.from(rows, (row, r) => r * length + this.endOf(row))
    const mask = causalMask(rows.length, length)
    let h = replaceBy(ids, () => {
      const places = this.#positions.view([length, this.config.width])
      const tokens = reshape(embedding(this.#tokens, ids), [rows.length, length, -1])
      return reshape(add(tokens, places), [rows.length * length, -1])
    })
    for (const [i, block] of this.#blocks.entries()) {
      capture?.(`hidden_states.${i}`, h)
      yield
      h = replaceBy(h, (x) => block(x, mask))
    }
    capture?.(`hidden_states.${layers}`, h)
    mask.segment.dispose()
    mask.order.dispose()
    return replaceBy(h, (x) => {
      // The norm works row by row, so only the rows that are asked for need it.
      const pooled = this.#norm(embedding(x, Tensor.from(ends)))
      return this.#project ? this.#project(pooled) : pooled
    })
  }

  /** Frees the parameters. */
  dispose(): void {
    this.#weights.dispose()
  }
}
