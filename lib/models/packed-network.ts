import { type ModelConfig, writePretrained } from '../io/pretrained.ts'
import { type TokenArrays, uploadLayout } from '../nn/attention.ts'
import { conditioning, roundToBf16, TIME_FEATURES, timeFeatures } from '../nn/embed.ts'
import { tensorsToWrite } from '../nn/export.ts'
import { type Linear, type LowRank, linearLayer } from '../nn/linear.ts'
import { modulatedNorm } from '../nn/norm.ts'
import type { Offload } from '../nn/offload.ts'
import type { ComputeType, Weights } from '../nn/weights.ts'
import { cast } from '../ops/cast.ts'
import { reshape } from '../ops/copy.ts'
import { unpatchify } from '../ops/patchify.ts'
import { silu } from '../ops/pointwise.ts'
import { type LatentLayout, type Layout, layoutSteps } from '../pyramid/layout.ts'
import { scope } from '../tensor/scope.ts'
import { checkpoint, drain, needsGrad, type Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { DoubleBlock } from './blocks.ts'
import { checkInputs, checkLayout, checkPast } from './network-inputs.ts'
import type { LayoutInputs, NetworkConfig, TransformerInputs, VelocityNetwork } from './velocity-network.ts'

type Capture = TransformerInputs['capture']

/** One call on its way through the blocks. */
export interface Pass {
  /** SiLU(temb), [R, d]. */
  readonly e: Tensor
  readonly arrays: TokenArrays
  readonly recording: boolean
  readonly capture: Capture
  /** Runs block `i` of `n` on the streams and e: freeing what it used, kept for backward, or to be computed again. */
  readonly apply: (i: number, n: number, block: Block, streams: readonly Tensor[]) => Tensor[]
}

type Block = (...inputs: Tensor[]) => Tensor[]

/** What differs between the network families. */
export interface Trunk {
  /** Clips of the compute type → tokens [N, d]. */
  readonly embed: (clips: readonly (readonly Tensor[])[], layout: LatentLayout, capture: Capture) => Tensor
  /**
   * Latent tokens [N, d] and text tokens [R·S, d] → the latent tokens after all blocks. Without text where its keys and
   * values are kept ones. Pauses after every block.
   */
  readonly run: (x: Tensor, c: Tensor | null, pass: Pass) => Steps<Tensor>
  /** Whether block `i` of `n` is computed again in backward at this share. */
  readonly recomputes: (i: number, n: number, share: number) => boolean
}

/** What a network is made of besides the parts that both families share. */
export interface NetworkForm<C extends NetworkConfig> {
  readonly className: string
  readonly config: C
  readonly latentChannels: number
  /** Head channels of each rotary axis. */
  readonly headAxes: readonly number[]
  /** Asks for its weights in the published order, on which optimizer states depend. Pauses after every block. */
  readonly trunk: (w: Weights) => Steps<Trunk>
}

/** The layers of a network, by what they do. */
export interface NetworkParts {
  readonly weights: Weights
  readonly embedTime: (phi: Tensor, pooled: Tensor) => Tensor
  readonly embedText: Linear
  readonly trunk: Trunk
  readonly normOut: (x: Tensor, e: Tensor, rows: Tensor) => Tensor
  readonly projOut: Linear
}

/** Makes a network's layers, in the order in which optimizer states have them; big ones take tens of milliseconds. */
export function* networkParts<C extends NetworkConfig>(
  w: Weights,
  form: NetworkForm<C>,
): Steps<NetworkParts> {
  const { config } = form
  const width = config.num_attention_heads * config.attention_head_dim
  const embedTime = conditioning(w.sub('time_text_embed'), config.pooled_projection_dim, width)
  const text = w.sub('context_embedder')
  const embedText = linearLayer(text, config.joint_attention_dim, width, { normal: 0.02 })
  yield
  const trunk = yield* form.trunk(w)
  const normOut = modulatedNorm(w.sub('norm_out'), width)
  const projOut = linearLayer(w.sub('proj_out'), width, 4 * form.latentChannels, 'zeros')
  return { weights: w, embedTime, embedText, trunk, normOut, projOut }
}

/**
 * What the published velocity networks share (spec/dit-flux.md §2–5, §7.4): conditioning by time and text, the packed
 * token layout, the head, loading and saving. Each brings its patch embedding and its blocks.
 */
export class PackedNetwork<C extends NetworkConfig> implements VelocityNetwork {
  readonly config: C
  readonly dtype: ComputeType
  readonly latentChannels: number
  /** What is trained, under the published keys. */
  readonly parameters: Map<string, Tensor>
  /** What is saved with the parameters but never trained. */
  readonly buffers: ReadonlyMap<string, Tensor>
  /**
   * Share of the blocks that are computed again in backward instead of kept (spec/training.md §3), or false.
   * Begins as the config says.
   */
  checkpointing: number | false
  readonly offload: Offload | null
  readonly #form: NetworkForm<C>
  readonly #parts: NetworkParts
  // Of a network that another one made to add them; that one owns the weights.
  readonly #adapters: ReadonlyMap<string, LowRank> | null

  protected constructor(
    form: NetworkForm<C>,
    parts: NetworkParts,
    adapters: ReadonlyMap<string, LowRank> | null = null,
  ) {
    const { config } = form
    const { weights } = parts
    this.config = config
    this.dtype = weights.dtype
    this.latentChannels = form.latentChannels
    this.checkpointing = config.use_gradient_checkpointing && config.gradient_checkpointing_ratio
    this.offload = weights.offload
    this.#form = form
    this.#parts = parts
    this.#adapters = adapters
    this.parameters = weights.parameters
    this.buffers = weights.buffers
  }

  /**
   * A network over the same weights whose layers add these low-rank products, by layer name (`…attn.to_q`). This one
   * stays as it is and must outlive it; disposing the other frees nothing.
   */
  adapted(adapters: ReadonlyMap<string, LowRank>): PackedNetwork<C> {
    const weights = this.#parts.weights.withAdapters(adapters)
    const network = new PackedNetwork(this.#form, drain(networkParts(weights, this.#form)), adapters)
    network.checkpointing = this.checkpointing
    return network
  }

  /** The token layout of inputs of these sizes, to be reused by every step of a stage. */
  layout(inputs: LayoutInputs): Layout {
    return drain(this.layoutSteps(inputs))
  }

  /** `layout` that pauses now and then, for `sliced`. */
  layoutSteps(inputs: LayoutInputs): Steps<Layout> {
    const { columns, text, textMask, causal = this.config.use_temporal_causal } = inputs
    return layoutSteps({
      columns: columns.map((clips) => ({
        clips: clips.map(({ shape }) => ({ frames: shape[2], height: shape[3], width: shape[4] })),
      })),
      batch: columns[0]?.[0]?.shape[0] ?? 0,
      textLength: text.shape[1] as number,
      textMask,
      headAxes: this.#form.headAxes,
      causal,
    })
  }

  /** φ(τ) as this network takes it, [R, 256]. */
  timeFeatures(timesteps: ArrayLike<number>, round = this.dtype === 'bf16'): Float32Array {
    return timeFeatures(round ? Array.from(timesteps, roundToBf16) : timesteps)
  }

  /**
   * The velocity of each column's last clip, of that clip's shape. Without training everything else is freed at once;
   * while recording, call it inside a scope that ends after backward.
   *
   * @throws ERR_SHAPE or ERR_DTYPE naming the input that does not fit.
   */
  forward(inputs: TransformerInputs): Tensor[] {
    const run = (): Tensor[] => drain(this.forwardSteps(inputs))
    return this.#recording(inputs) ? run() : scope(run)
  }

  /** `forward` that pauses after every block, for `sliced`; what it makes belongs to the surrounding scope. */
  *forwardSteps(inputs: TransformerInputs): Steps<Tensor[]> {
    const { config, dtype } = this
    checkInputs(inputs, {
      channels: this.latentChannels,
      textWidth: config.joint_attention_dim,
      pooledWidth: config.pooled_projection_dim,
    })
    const layout = inputs.layout ?? (yield* this.layoutSteps(inputs))
    checkLayout(inputs, layout)
    yield
    const recording = this.#recording(inputs)
    const { capture, columns, text, pooled, keep, past } = inputs
    if (keep || past) checkPast(inputs, layout, this.parameters)
    const arrays = uploadLayout(past ? past.current.tokens : layout, recording, {
      keep: keep?.writer(),
      past: past?.reader(),
    })
    const placed: LatentLayout = past ? past.current.placed : layout
    const phi =
      inputs.timeFeatures ??
      Tensor.from(this.timeFeatures(inputs.timesteps, inputs.roundTimesteps), [layout.rows, TIME_FEATURES])

    const temb = this.#parts.embedTime(phi, cast(pooled, dtype)) // [R, d]
    capture?.('temb', temb)
    const e = silu(temb)
    const c = past ? null : this.#parts.embedText(reshape(cast(text, dtype), [layout.textTokens, -1])) // [R·S, d]
    if (c) capture?.('context_embedder', c)
    const clips = columns.map((column) => column.slice(past ? -1 : 0).map((clip) => cast(clip, dtype)))
    const x = this.#parts.trunk.embed(clips, placed, capture) // [N, d]
    yield

    const apply: Pass['apply'] = (i, n, block, streams) =>
      this.#runner(i, n, recording)(block, [...streams, e])
    const z = yield* this.#parts.trunk.run(x, c, { e, arrays, recording, capture, apply })
    const normed = this.#parts.normOut(z, e, arrays.latentRows)
    capture?.('norm_out', normed)
    const y = this.#parts.projOut(normed) // [N, 4C]
    return columns.map((clips, c) => {
      const { shape } = clips[clips.length - 1] as Tensor
      const { rowOffset, rowStride } = placed.predictionTokens[c]
      return unpatchify(y, { rowOffset, rowStride, shape })
    })
  }

  #recording({ text, pooled, columns }: TransformerInputs): boolean {
    const own = [...(this.#adapters?.values() ?? [])].flatMap(({ a, b }) => [a, b])
    return [text, pooled, ...columns.flat(), ...this.parameters.values(), ...own].some(needsGrad)
  }

  #runner(i: number, n: number, recording: boolean): (block: Block, inputs: Tensor[]) => Tensor[] {
    if (!recording) return runAndFree
    const share = this.checkpointing
    if (share !== false && this.#parts.trunk.recomputes(i, n, share)) return checkpoint
    return (block, inputs) => block(...inputs)
  }

  /** The whole config.json, with the class that it names. */
  modelConfig(): ModelConfig {
    return Object.fromEntries([['_class_name', this.#form.className], ...Object.entries(this.config)])
  }

  /**
   * Writes config.json and the weights as published folders hold them, by default in the type computed in; buffers keep
   * theirs.
   *
   * @throws ERR_IO
   */
  async save(dir: string, options: { dtype?: ComputeType; signal?: AbortSignal } = {}): Promise<void> {
    const { dtype = this.dtype, ...rest } = options
    const tensors = [...tensorsToWrite(this.buffers), ...tensorsToWrite(this.parameters, dtype)]
    await writePretrained(dir, this.modelConfig(), tensors, rest)
  }

  /** Frees the parameters. */
  dispose(): void {
    if (!this.#adapters) this.#parts.weights.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** How the weights of a velocity network are loaded: training writes keys that begin with `dit.`, and others beside them. */
export const NETWORK_KEYS = { stripPrefix: 'dit.', ignorePrefixes: ['vae', 'text_encoder'] } as const

/** The two-stream blocks one after the other, over latents and, unless its keys and values are kept ones, text. */
export function* runDouble(
  blocks: readonly DoubleBlock[],
  streams: readonly Tensor[],
  { arrays, capture, apply }: Pick<Pass, 'arrays' | 'capture' | 'apply'>,
): Steps<readonly Tensor[]> {
  let all = streams
  for (const [i, block] of blocks.entries()) {
    const run: Block = (...inputs) => block(inputs.slice(0, -1), inputs.at(-1) as Tensor, arrays)
    all = apply(i, blocks.length, run, all)
    const [x, c] = all as [Tensor, Tensor | undefined]
    capture?.(`transformer_blocks.${i}.hidden_states`, x)
    if (c) capture?.(`transformer_blocks.${i}.encoder_hidden_states`, c)
    yield
  }
  return all
}

// Without backward nobody needs a block's inputs again, and a scope would hold those of all blocks to the end. The
// last input is e, which every block gets.
function runAndFree(block: Block, inputs: Tensor[]): Tensor[] {
  const results = scope(() => block(...inputs))
  for (const x of inputs.slice(0, -1)) if (!results.includes(x)) x.dispose()
  return results
}
