import { PyraflowError } from '../engine/errors.ts'
import { type ModelConfig, readConfig, writePretrained } from '../io/pretrained.ts'
import { uploadLayout } from '../nn/attention.ts'
import { conditioning, roundToBf16 } from '../nn/embed.ts'
import { tensorsToWrite } from '../nn/export.ts'
import { type Linear, linearLayer } from '../nn/linear.ts'
import { modulatedNorm } from '../nn/norm.ts'
import { type ComputeType, Weights } from '../nn/weights.ts'
import { cast } from '../ops/cast.ts'
import { concat, reshape, slice } from '../ops/copy.ts'
import { packTokens, unpatchify } from '../ops/patchify.ts'
import { silu } from '../ops/pointwise.ts'
import { type Layout, makeLayout } from '../pyramid/layout.ts'
import { Generator } from '../tensor/generator.ts'
import { scope } from '../tensor/scope.ts'
import { checkpoint, drain, needsGrad, type Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { type DoubleBlock, doubleBlock, type SingleBlock, singleBlock } from './blocks.ts'
import { checkFluxConfig, type FluxConfig } from './flux-config.ts'

export { type FluxConfig, parameterCount } from './flux-config.ts'

/** How to make a network. */
export interface TransformerOptions {
  /** Type of weights and activations; sums and statistics are f32 in both. Default `f32`. */
  dtype?: ComputeType
  /** Parameters want gradients. Default false. */
  train?: boolean
  /** Keep packed copies of the weights, which inference runs faster on. Default: unless training. */
  pack?: boolean
}

/** What one call of the network gets. R = bs·C rows; row b·C + c belongs to sequence b of column c. */
export interface TransformerInputs {
  /** Columns of clips [bs, 16, t, h, w], oldest first; the last clip of each is the noisy one. */
  columns: readonly (readonly Tensor[])[]
  /** τ in 0 to 1000, [R]. */
  timesteps: ArrayLike<number>
  /** [R, S, joint_attention_dim]. */
  text: Tensor
  /** [R, S], 1 for a token and 0 for padding. */
  textMask?: readonly ArrayLike<number>[] | ArrayLike<number> | undefined
  /** [R, pooled_projection_dim]. */
  pooled: Tensor
  /** Whether frames see no later frames; default from the config. */
  causal?: boolean | undefined
  /** What `layout()` gave for inputs of these sizes, mask and causality; made anew when absent. */
  layout?: Layout | undefined
  /** Round τ to bf16 before it is embedded; default in bf16, as the reference's sampler does (its trainer does not). */
  roundTimesteps?: boolean | undefined
  /** Is shown intermediate results while they live. */
  capture?: ((name: string, tensor: Tensor) => void) | undefined
}

/**
 * The flux-variant velocity network of Pyramid Flow (spec/dit-flux.md): packed columns of clips, their times and
 * their text in; the velocity of every column's last clip out.
 */
export class PyramidFluxTransformer {
  readonly config: FluxConfig
  readonly dtype: ComputeType
  /** Under the published keys. */
  readonly parameters: Map<string, Tensor>
  /**
   * Share of the blocks that are computed again in backward instead of kept (spec/training.md §3), or false.
   * Begins as the config says.
   */
  checkpointing: number | false
  readonly #weights: Weights
  readonly #embedTime: (timesteps: ArrayLike<number>, pooled: Tensor) => Tensor
  readonly #embedText: Linear
  readonly #embedLatent: Linear
  readonly #double: DoubleBlock[]
  readonly #single: SingleBlock[]
  readonly #normOut: (x: Tensor, e: Tensor, rows: Tensor) => Tensor
  readonly #projOut: Linear

  private constructor(config: FluxConfig, w: Weights) {
    const heads = config.num_attention_heads
    const headDim = config.attention_head_dim
    const width = heads * headDim
    this.config = config
    this.dtype = w.dtype
    this.checkpointing = config.use_gradient_checkpointing && config.gradient_checkpointing_ratio
    this.#embedTime = conditioning(w.sub('time_text_embed'), config.pooled_projection_dim, width)
    this.#embedText = linearLayer(w.sub('context_embedder'), config.joint_attention_dim, width, {
      normal: 0.02,
    })
    this.#embedLatent = linearLayer(w.sub('x_embedder'), config.in_channels, width)
    const attention = { heads, headDim, eps: 1e-6, textNorm: 'norm_added_', textOutput: true }
    const block = (name: string, i: number): Weights => w.sub(name).sub(i)
    this.#double = Array.from({ length: config.num_layers }, (_, i) =>
      doubleBlock(block('transformer_blocks', i), attention),
    )
    this.#single = Array.from({ length: config.num_single_layers }, (_, i) =>
      singleBlock(block('single_transformer_blocks', i), attention),
    )
    this.#normOut = modulatedNorm(w.sub('norm_out'), width)
    this.#projOut = linearLayer(
      w.sub('proj_out'),
      width,
      config.patch_size ** 2 * config.in_channels,
      'zeros',
    )
    this.#weights = w
    this.parameters = w.parameters
  }

  /**
   * Loads a published model folder, or one of a training run, whose keys may begin with `dit.`. Weights of the type
   * computed in stay in the mapped file.
   *
   * @throws ERR_IO when the folder cannot be read; ERR_CHECKPOINT naming the key that is missing, unknown, of another
   * shape or not finite, or the field of config.json that is wrong.
   */
  static async fromPretrained(
    dir: string,
    options: TransformerOptions = {},
  ): Promise<PyramidFluxTransformer> {
    const config = checkFluxConfig(readConfig(dir), 'ERR_CHECKPOINT')
    const weights = Weights.open(dir, { ...options, stripPrefix: 'dit.' })
    try {
      const model = new PyramidFluxTransformer(config, weights)
      weights.assertAllUsed({ ignorePrefixes: ['vae', 'text_encoder'] })
      await weights.checkFinite()
      return model
    } catch (error) {
      weights.dispose()
      throw error
    }
  }

  /**
   * A new network, initialised as spec/dit-flux.md §8 says; absent fields take the published class's defaults.
   *
   * @throws ERR_OPTION for a configuration that fits no network.
   */
  static create(
    config: Partial<FluxConfig>,
    options: TransformerOptions & { seed: number | bigint },
  ): PyramidFluxTransformer {
    const { seed, ...rest } = options
    const checked = checkFluxConfig(config, 'ERR_OPTION')
    return new PyramidFluxTransformer(checked, Weights.init(new Generator(seed), rest))
  }

  /** The token layout of inputs of these sizes, to be reused by every step of a stage. */
  layout(inputs: Pick<TransformerInputs, 'columns' | 'text' | 'textMask' | 'causal'>): Layout {
    const { columns, text, textMask, causal = this.config.use_temporal_causal } = inputs
    return makeLayout({
      columns: columns.map((clips) => ({
        clips: clips.map(({ shape }) => ({ frames: shape[2], height: shape[3], width: shape[4] })),
      })),
      batch: columns[0]?.[0]?.shape[0] ?? 0,
      textLength: text.shape[1] as number,
      textMask,
      headAxes: this.config.axes_dims_rope,
      causal,
    })
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
    this.#check(inputs)
    const layout = inputs.layout ?? this.layout(inputs)
    this.#checkLayout(inputs, layout)
    yield
    const recording = this.#recording(inputs)
    const { capture, columns, text, pooled } = inputs
    const { dtype } = this
    const arrays = uploadLayout(layout, recording)
    const round = inputs.roundTimesteps ?? dtype === 'bf16'
    const timesteps = round ? Array.from(inputs.timesteps, roundToBf16) : inputs.timesteps

    const temb = this.#embedTime(timesteps, cast(pooled, dtype)) // [R, d]
    capture?.('temb', temb)
    const e = silu(temb)
    let c = this.#embedText(reshape(cast(text, dtype), [layout.textTokens, -1])) // [R·S, d]
    capture?.('context_embedder', c)
    const clips = columns.map((column) => column.map((clip) => cast(clip, dtype)))
    let x = this.#embedLatent(packTokens(clips, layout)) // [N, d]
    yield

    for (const [i, block] of this.#double.entries()) {
      const run = this.#runner(i, this.#double.length, recording)
      ;[x, c] = run((a, b, s) => block(a, b, s, arrays), [x, c], e) as [Tensor, Tensor]
      capture?.(`transformer_blocks.${i}.hidden_states`, x)
      capture?.(`transformer_blocks.${i}.encoder_hidden_states`, c)
      yield
    }
    let z = concat([c, x], 0) // [R·S + N, d]
    if (!recording) for (const t of [c, x]) t.dispose()
    for (const [i, block] of this.#single.entries()) {
      const run = this.#runner(i, this.#single.length, recording)
      ;[z] = run((a, s) => [block(a, s, arrays)], [z], e) as [Tensor]
      capture?.(`single_transformer_blocks.${i}`, z)
      yield
    }
    x = this.#normOut(slice(z, 0, layout.textTokens, layout.latentTokens), e, arrays.latentRows)
    capture?.('norm_out', x)
    const y = this.#projOut(x) // [N, 64]
    return columns.map((clips, c) => {
      const { shape } = clips[clips.length - 1] as Tensor
      const { rowOffset, rowStride } = layout.predictionTokens[c]
      return unpatchify(y, { rowOffset, rowStride, shape })
    })
  }

  #recording({ text, pooled, columns }: TransformerInputs): boolean {
    return [text, pooled, ...columns.flat()].some(needsGrad) || [...this.parameters.values()].some(needsGrad)
  }

  // How block i of n runs: at once, kept for backward, or to be computed again.
  #runner(i: number, n: number, recording: boolean): Runner {
    if (!recording) return runAndFree
    // The reference recomputes one block more than the ratio suggests.
    const again = this.checkpointing !== false && i <= Math.trunc(n * this.checkpointing)
    return again ? (block, xs, e) => checkpoint(block, [...xs, e]) : (block, xs, e) => block(...xs, e)
  }

  #check({ columns, timesteps, text, pooled }: TransformerInputs): void {
    const { config } = this
    const first = columns[0]?.[0]
    if (!first || columns.some((clips) => clips.length === 0)) {
      throw mismatch('columns', 'at least one, each with a clip', 'none')
    }
    const batch = first.shape[0] as number
    const rows = batch * columns.length
    const channels = config.in_channels / 4
    columns.forEach((clips, c) => {
      clips.forEach((clip, j) => {
        if (clip.rank === 5 && clip.shape[0] === batch && clip.shape[1] === channels) return
        throw mismatch(`columns[${c}][${j}]`, `[${batch}, ${channels}, t, h, w]`, clip)
      })
    })
    if (timesteps instanceof Tensor || typeof timesteps.length !== 'number') {
      const received = timesteps instanceof Tensor ? 'a tensor' : typeof timesteps
      throw new PyraflowError('ERR_DTYPE', { what: 'timesteps', expected: 'numbers', received })
    }
    const bad = Array.from(timesteps).find((t) => !Number.isFinite(t))
    if (timesteps.length !== rows || bad !== undefined) {
      throw mismatch(
        'timesteps',
        `${rows} finite numbers`,
        bad === undefined ? `${timesteps.length}` : `${bad}`,
      )
    }
    const width = config.joint_attention_dim
    if (text.rank !== 3 || text.shape[0] !== rows || text.shape[1] === 0 || text.shape[2] !== width) {
      throw mismatch('text', `[${rows}, S, ${width}]`, text)
    }
    if (pooled.rank !== 2 || pooled.shape[0] !== rows || pooled.shape[1] !== config.pooled_projection_dim) {
      throw mismatch('pooled', `[${rows}, ${config.pooled_projection_dim}]`, pooled)
    }
    for (const [name, t] of [
      ...columns.flat().map((t) => ['columns', t] as const),
      ['text', text],
      ['pooled', pooled],
    ] as const) {
      if (t.dtype === 'f32' || t.dtype === 'bf16') continue
      throw new PyraflowError('ERR_DTYPE', { what: name, expected: 'f32 or bf16', received: t.dtype })
    }
  }

  // A layout that was made for other sizes would read the wrong rows.
  #checkLayout({ columns, text }: TransformerInputs, layout: Layout): void {
    const sizes = layout.columns.map(({ clips }) => clips.map((c) => `${c.frames}×${c.height}×${c.width}`))
    const given = columns.map((clips) => clips.map(({ shape }) => shape.slice(2).join('×')))
    const rows = text.shape[0] as number
    if (`${sizes}` === `${given}` && layout.rows === rows && layout.textLength === text.shape[1]) return
    throw mismatch(
      'layout',
      `one for clips of ${given.join(' | ')} and text [${text.shape}]`,
      `${sizes.join(' | ')}`,
    )
  }

  /** Writes config.json and the weights as published folders hold them. @throws ERR_IO */
  async save(dir: string, options: { dtype?: ComputeType; signal?: AbortSignal } = {}): Promise<void> {
    const { dtype, ...rest } = options
    const config: ModelConfig = { _class_name: 'PyramidFluxTransformer', ...this.config }
    await writePretrained(dir, config, tensorsToWrite(this.parameters, dtype), rest)
  }

  /** Frees the parameters. */
  dispose(): void {
    this.#weights.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

type Block = (...inputs: Tensor[]) => Tensor[]
type Runner = (block: Block, xs: readonly Tensor[], e: Tensor) => Tensor[]

// Without backward nobody needs a block's inputs again, and a scope would hold those of all blocks to the end.
function runAndFree(block: Block, xs: readonly Tensor[], e: Tensor): Tensor[] {
  const results = scope(() => block(...xs, e))
  for (const x of xs) if (!results.includes(x)) x.dispose()
  return results
}

function mismatch(what: string, expected: string, received: Tensor | string): PyraflowError {
  const text = received instanceof Tensor ? `[${received.shape.join(', ')}]` : received
  return new PyraflowError('ERR_SHAPE', { what, expected, received: text })
}
