import { PyraflowError } from '../engine/errors.ts'
import { openWeights, type Safetensors } from '../io/safetensors.ts'
import { linearLayer } from '../nn/linear.ts'
import { type ComputeType, Weights } from '../nn/weights.ts'
import { attention } from '../ops/attention.ts'
import { concat, permute, reshape, slice } from '../ops/copy.ts'
import { embedding } from '../ops/embedding.ts'
import { rmsNorm } from '../ops/norm.ts'
import { add, mul } from '../ops/pointwise.ts'
import { scope } from '../tensor/scope.ts'
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

/** Sizes of a T5 v1.1 encoder. */
export interface T5Config {
  readonly width: number
  readonly heads: number
  readonly headDim: number
  readonly hidden: number
  readonly layers: number
  readonly vocabulary: number
  readonly eps: number
}

// Far distances share a bucket; the thresholds are written out, because the formula's logarithm rounds at 16, 32 and 64.
const BUCKETS = 32
const MAX_DISTANCE = 128
const FAR = [12, 16, 23, 32, 46, 64, 91] as const

/** Bucket of the relative position δ = key − query (spec/text.md eq. 5). */
export function relativeBucket(delta: number): number {
  const distance = Math.abs(delta)
  const near = distance < 8 ? distance : 8 + FAR.filter((from) => distance >= from).length
  return (delta > 0 ? BUCKETS / 2 : 0) + near
}

// Logit of a key that is padding: far below all others, and finite so that it cannot make a NaN.
const HIDDEN = -1e30

/** Extra channels of queries, keys and values, each [R, S, H, S + 1]. */
interface Tails {
  readonly q: Tensor
  readonly k: Tensor
  readonly v: Tensor
}

/**
 * Relative bias and key mask as channels of the attention: the query carries its row of biases and a 1, key j a 1 at
 * channel j and its mask, so that their product is what has to be added to the logit; the values' are zero.
 */
function attentionTails(table: Tensor, mask: readonly (readonly number[])[]): Tails {
  const { dtype } = table
  const heads = table.shape[1] as number
  const [rows, length] = [mask.length, (mask[0] as readonly number[]).length]
  const bucketOf = Int32Array.from({ length: 2 * length - 1 }, (_, i) => relativeBucket(i - length + 1))
  const buckets = new Int32Array(length * length)
  // Query i sees the positions −i to length − 1 − i.
  for (let i = 0; i < length; i++) {
    buckets.set(bucketOf.subarray(length - 1 - i, 2 * length - 1 - i), i * length)
  }
  const keys = new Float32Array(rows * length * (length + 1))
  mask.forEach((row, r) => {
    row.forEach((seen, j) => {
      const at = (r * length + j) * (length + 1)
      keys[at + j] = 1
      keys[at + length] = seen ? 0 : HIDDEN
    })
  })
  return scope(() => {
    const bias = reshape(embedding(table, Tensor.from(buckets)), [length, length, heads])
    const query = concat([permute(bias, [0, 2, 1]), Tensor.full([length, heads, 1], 1, dtype)], 2)
    const v = Tensor.zeros([rows, length, heads, length + 1], dtype)
    return { q: add(v, query), k: add(v, Tensor.from(keys, [rows, length, 1, length + 1])), v }
  })
}

// @throws ERR_SHAPE when the mask is not one of R rows of S, each with a token.
function checkMask(rows: number, length: number, mask: readonly (readonly number[])[]): void {
  if (mask.length === rows && mask.every((row) => row.length === length && row.some(Boolean))) return
  throw new PyraflowError('ERR_SHAPE', {
    what: 'T5: mask',
    expected: `${rows} × ${length} values, at least one of each row set`,
    received: `[${mask.map((row) => row.length)}], of which set ${mask.map((row) => row.filter(Boolean).length)}`,
  })
}

/** What a config.json calls this network. */
export const T5_CLASSES: readonly string[] = ['T5EncoderModel', 'T5ForConditionalGeneration', 't5']
// The token table may be stored under both of its names.
const IGNORED = ['encoder.embed_tokens.', 'decoder.', 'lm_head.']

function t5Config(c: TextConfig): T5Config {
  c.oneOf('feed_forward_proj', ['gated-gelu'])
  c.oneOf('relative_attention_num_buckets', [BUCKETS])
  c.oneOf('relative_attention_max_distance', [MAX_DISTANCE])
  return {
    width: c.size('d_model'),
    heads: c.size('num_heads'),
    headDim: c.size('d_kv'),
    hidden: c.size('d_ff'),
    layers: c.size('num_layers'),
    vocabulary: c.size('vocab_size'),
    eps: c.eps('layer_norm_epsilon'),
  }
}

type Block = (h: Tensor, tails: Tails) => Tensor

function t5Block(w: Weights, c: T5Config): Block {
  const inner = c.heads * c.headDim
  const plain = (at: Weights, inputs: number, outputs: number) =>
    linearLayer(at, inputs, outputs, 'xavier', false)
  const own = w.sub('layer.0.SelfAttention')
  const [q, k, v] = ['q', 'k', 'v'].map((name) => plain(own.sub(name), c.width, inner))
  const out = plain(own.sub('o'), inner, c.width)
  const norm = w.get('layer.0.layer_norm.weight', [c.width], 'ones')
  const normFeed = w.get('layer.1.layer_norm.weight', [c.width], 'ones')
  const feed = w.sub('layer.1.DenseReluDense')
  const gate = plain(feed.sub('wi_0'), c.width, c.hidden)
  const up = plain(feed.sub('wi_1'), c.width, c.hidden)
  const down = plain(feed.sub('wo'), c.hidden, c.width)

  return (h, tails) => {
    const [rows, length] = tails.q.shape as [number, number]
    const x = rmsNorm(h, norm, c.eps)
    const joined = (project: typeof q, tail: Tensor): Tensor =>
      concat([reshape((project as typeof out)(x), [rows, length, c.heads, c.headDim]), tail], 3)
    const o = attention(joined(q, tails.q), joined(k, tails.k), joined(v, tails.v), { scale: 1 })
    const attended = out(reshape(slice(o, 3, 0, c.headDim), [rows * length, inner]), { residual: h })
    const y = rmsNorm(attended, normFeed, c.eps)
    return down(mul(gate(y, { activation: 'geluTanh' }), up(y)), { residual: attended })
  }
}

/** How to load a T5 encoder. */
export interface T5Options extends TextNetworkOptions {
  /**
   * Keep the weights. Without, every use reads them from the file a layer at a time and lets them go again: the network
   * then takes the memory of a layer, and the time of reading the file. Default true.
   */
  readonly resident?: boolean
}

/** Tokens of R prompts. */
export interface T5Tokens {
  /** R rows of S ids. */
  readonly ids: readonly (readonly number[])[]
  /** R × S, 1 for a token and 0 for padding, which is not attended to. */
  readonly mask: readonly (readonly number[])[]
}

/** The encoder half of T5 v1.1 (spec/text.md §2). */
export class T5Encoder {
  readonly config: T5Config
  readonly dtype: ComputeType
  readonly #weights: Weights
  /** Where weights that are not kept come from. */
  readonly #source: Safetensors | null

  private constructor(
    config: T5Config,
    weights: Weights,
    options: { dtype: ComputeType; source?: Safetensors },
  ) {
    this.config = config
    this.dtype = options.dtype
    this.#weights = weights
    this.#source = options.source ?? null
    // Asking for a weight is what loads it, or says that it is missing.
    this.#table(weights)
    this.#bias(weights)
    for (let i = 0; i < config.layers; i++) this.#block(weights, i)
    this.#norm(weights)
  }

  #table(w: Weights): Tensor {
    const name = w.has('shared.weight') ? 'shared.weight' : 'encoder.embed_tokens.weight'
    return w.get(name, [this.config.vocabulary, this.config.width])
  }

  #bias(w: Weights): Tensor {
    const name = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    return w.get(name, [BUCKETS, this.config.heads])
  }

  #block(w: Weights, i: number): Block {
    return t5Block(w.sub('encoder.block').sub(i), this.config)
  }

  #norm(w: Weights): Tensor {
    return w.get('encoder.final_layer_norm.weight', [this.config.width], 'ones')
  }

  // What `use` queues runs before its weights are freed, because commands run in order.
  #with<T>(use: (w: Weights) => T): T {
    if (!this.#source) return use(this.#weights)
    const weights = Weights.open(this.#source, { dtype: this.dtype, pack: false })
    try {
      return use(weights)
    } finally {
      weights.dispose()
    }
  }

  /**
   * Loads a published folder, whole or in shards.
   *
   * @throws ERR_IO when the folder or a shard cannot be read; ERR_CHECKPOINT when it holds another network, or one
   * that this class does not compute; ERR_ABORTED.
   */
  static async fromPretrained(folder: string, options: T5Options = {}): Promise<T5Encoder> {
    const { resident = true, ...rest } = options
    const c = new TextConfig(folder, T5_CLASSES)
    const config = t5Config(c)
    const { dtype = 'f32' } = rest
    const make = (weights: Weights, source?: Safetensors): T5Encoder =>
      new T5Encoder(config, weights, source ? { dtype, source } : { dtype })
    if (resident) return loadNetwork(folder, rest, (weights) => make(weights), IGNORED)
    const source = openWeights(folder)
    const survey = Weights.open(source, { survey: true })
    try {
      const encoder = make(survey, source)
      survey.assertAllUsed(IGNORED)
      return encoder
    } finally {
      survey.dispose()
    }
  }

  /**
   * The last hidden states [R, S, d] of R rows of S tokens, padded ones included. Pauses after every layer.
   *
   * @param mask - R × S, 1 for a token and 0 for padding, which is not attended to
   * @throws ERR_SHAPE, ERR_OPTION for rows that differ in length, an id outside the vocabulary or a row without tokens
   */
  *forwardSteps(
    ids: readonly (readonly number[])[],
    mask: readonly (readonly number[])[],
    capture?: Capture,
  ): Steps<Tensor> {
    return (yield* this.forwardEachSteps([{ ids, mask }], capture))[0] as Tensor
  }

  /** {@link forwardSteps} of several inputs that do not know of each other, with one pass over the weights. */
  *forwardEachSteps(inputs: readonly T5Tokens[], capture?: Capture): Steps<Tensor[]> {
    const { vocabulary, width, eps, layers } = this.config
    const ids = inputs.map(({ ids: rows, mask }) => {
      const length = rows[0]?.length ?? 0
      const tensor = tokenTensor('T5', rows, length, vocabulary)
      checkMask(rows.length, length, mask)
      return tensor
    })
    const tails = this.#with((w) => inputs.map(({ mask }) => attentionTails(this.#bias(w), mask)))
    yield
    let states = this.#with((w) => ids.map((rows) => embedding(this.#table(w), rows))) // [R·S, d]
    for (const rows of ids) rows.dispose()
    for (let i = 0; i < layers; i++) {
      for (const h of states) capture?.(`hidden_states.${i}`, h)
      yield
      states = this.#with((w) => {
        const block = this.#block(w, i)
        return states.map((h, j) => replaceBy(h, (x) => block(x, tails[j] as Tails)))
      })
    }
    for (const tail of tails.flatMap((t) => Object.values(t) as Tensor[])) tail.dispose()
    return this.#with((w) =>
      states.map((h, j) => {
        const { mask } = inputs[j] as T5Tokens
        const shape = [mask.length, (mask[0] as readonly number[]).length, width]
        return replaceBy(h, (x) => reshape(rmsNorm(x, this.#norm(w), eps), shape))
      }),
    )
  }

  /** Frees the parameters. */
  dispose(): void {
    this.#weights.dispose()
  }
}
