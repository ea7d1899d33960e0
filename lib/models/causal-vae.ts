import { convolutionBytes } from '../engine/convolution-bytes.ts'
import { DTYPES, engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { readConfig, writePretrained } from '../io/pretrained.ts'
import { tensorsToWrite } from '../nn/export.ts'
import { Weights } from '../nn/weights.ts'
import { cast } from '../ops/cast.ts'
import { conv3d } from '../ops/conv3d.ts'
import { permute, slice } from '../ops/copy.ts'
import { axpby, clamp, exp, mul, scale, square, sub } from '../ops/pointwise.ts'
import { sum } from '../ops/reduce.ts'
import type { Generator } from '../tensor/generator.ts'
import { scope } from '../tensor/scope.ts'
import { drain, needsGrad, type Steps } from '../tensor/tape.ts'
import { sizeOf, type Tensor } from '../tensor/tensor.ts'
import { startAsResampler } from './vae-init.ts'
import { CAUSAL_VAE_DEFAULTS, type CausalVaeConfig, checkConfig, VaeNetwork } from './vae-network.ts'
import { type Capture, Pass } from './vae-pass.ts'
import { decodeGrid, encodeGrid, overTiles, overTime, runChunk, type TileGrid } from './vae-pieces.ts'
import {
  checkPieces,
  choosePieces,
  chunkLengths,
  estimateElements,
  type PlannedClip,
  pixelLengths,
  type VaePieces,
  type VaePlan,
} from './vae-plan.ts'
import { DecodeStream } from './vae-stream.ts'

export { CAUSAL_VAE_DEFAULTS, type CausalVaeConfig } from './vae-network.ts'
export type { Capture } from './vae-pass.ts'

export interface VaeOptions {
  dtype?: 'f32' | 'bf16'
  /** Make the parameters leaves that collect gradients. */
  train?: boolean
  /** Ends the loading. */
  signal?: AbortSignal | undefined
}

/** How a new VAE begins. */
export interface NewVaeOptions extends Omit<VaeOptions, 'signal'> {
  generator: Generator
  /** Narrower than 0 would start the posterior. Default 0. */
  initialLogvar?: number
  /** As plain down- and upsampling ({@link startAsResampler}). */
  resampler?: boolean
}

export interface VaeRunOptions extends VaePieces {
  /** Sees intermediate results of every piece. */
  capture?: Capture | undefined
}

/** Gaussian over latents; both [B, C, T, H, W]. */
export interface Posterior {
  mean: Tensor
  /** Clamped to [−30, 20]. */
  logvar: Tensor
}

/**
 * The causal video VAE (spec/vae.md): 1 + 8m frames of h × w pixels ↔ 1 + m latent frames of h/8 × w/8. Videos are
 * [B, 3, T, H, W] in [−1, 1]; latents [B, 16, T, H, W], not normalised.
 */
export class CausalVideoVAE {
  readonly config: CausalVaeConfig
  readonly dtype: 'f32' | 'bf16'
  readonly parameters: Map<string, Tensor>
  readonly #encoder: VaeNetwork
  readonly #decoder: VaeNetwork
  readonly #weights: Weights

  private constructor(
    config: CausalVaeConfig,
    weights: Weights,
    networks: { encoder: VaeNetwork; decoder: VaeNetwork },
  ) {
    this.config = config
    this.dtype = weights.dtype
    this.#encoder = networks.encoder
    this.#decoder = networks.decoder
    this.parameters = weights.parameters
    this.#weights = weights
  }

  static *#steps(config: CausalVaeConfig, weights: Weights): Steps<CausalVideoVAE> {
    checkConfig(config)
    const encoder = yield* VaeNetwork.encoder(config, weights)
    const decoder = yield* VaeNetwork.decoder(config, weights)
    return new CausalVideoVAE(config, weights, { encoder, decoder })
  }

  /**
   * Loads a diffusers-style folder.
   * @throws ERR_CHECKPOINT naming the missing, extra or mis-shaped key.
   */
  static async fromPretrained(dir: string, options: VaeOptions = {}): Promise<CausalVideoVAE> {
    const config = { ...CAUSAL_VAE_DEFAULTS, ...(readConfig(dir) as Partial<CausalVaeConfig>) }
    const dtype = options.dtype ?? 'f32'
    const { train = false, signal } = options
    const how = { dtype, train, signal, stripPrefix: 'vae.', ignorePrefixes: ['loss.'] }
    return Weights.load(dir, how, (weights) => CausalVideoVAE.#steps(config, weights))
  }

  /**
   * A new VAE, initialised as spec/vae.md §8 says.
   * @throws ERR_CHECKPOINT for a configuration that fits no network.
   */
  static create(config: Partial<CausalVaeConfig>, options: NewVaeOptions): CausalVideoVAE {
    return drain(CausalVideoVAE.createSteps(config, options))
  }

  /** `create` that pauses after every block, for `sliced`. */
  static *createSteps(config: Partial<CausalVaeConfig>, options: NewVaeOptions): Steps<CausalVideoVAE> {
    const { dtype = 'f32', train = false, initialLogvar = 0, resampler, generator } = options
    const weights = Weights.init(generator, { dtype, train })
    const vae = yield* CausalVideoVAE.#steps({ ...CAUSAL_VAE_DEFAULTS, ...config }, weights)
    vae.#startCertain(initialLogvar)
    if (resampler) startAsResampler(vae.parameters)
    return vae
  }

  // Unit posterior noise over small initial means hides the signal for hundreds of steps.
  #startCertain(logvar: number): void {
    if (logvar === 0) return
    const bias = this.parameters.get('quant_conv.conv.bias') as Tensor
    const z = this.latentChannels
    scope(() => engine.run('fill', [], [bias.view([z], z)], [logvar]))
  }

  /** Pixels per latent cell along each side, e.g. 8. */
  get spatialFactor(): number {
    return 2 ** this.config.encoder_spatial_down_sample.filter(Boolean).length
  }

  /** Frames per latent frame, e.g. 8. */
  get temporalFactor(): number {
    return 2 ** this.config.encoder_temporal_down_sample.filter(Boolean).length
  }

  get latentChannels(): number {
    return this.config.encoder_out_channels
  }

  /**
   * Posterior of the latents of a clip [B, 3, 1 + 8m, H, W]; H and W multiples of the spatial factor. In pieces or
   * under a budget it works without a tape only; chunks change nothing but rounding, tiles blend moments at their seams.
   * @throws ERR_SHAPE; ERR_OPTION for pieces that cannot be; ERR_MEMORY when nothing fits the budget.
   */
  encode(x: Tensor, options: VaeRunOptions = {}): Posterior {
    const run = (): Posterior => drain(this.encodeSteps(x, options))
    return this.#recording(x) ? run() : scope(run)
  }

  /** `encode` that pauses after every layer, for `sliced`; what it makes belongs to the surrounding scope. */
  *encodeSteps(x: Tensor, options: VaeRunOptions = {}): Steps<Posterior> {
    this.#checkVideo(x)
    const f = this.temporalFactor
    const plan = this.planEncode(x.shape, options)
    const grid = plan.tile === null ? null : encodeGrid(plan.tile, this.spatialFactor)
    const moments = yield* this.#run(
      this.#encoder,
      x,
      grid,
      pixelLengths(x.shape[2] as number, plan, f),
      options,
    )
    const z = this.latentChannels
    const mean = slice(moments, 1, 0, z)
    return { mean, logvar: clamp(slice(moments, 1, z, z), -30, 20) }
  }

  /**
   * Frames [B, 3, 1 + 8m, 8h, 8w] of latents [B, 16, 1 + m, h, w], nominally in [−1, 1]; pieces as in {@link encode}.
   * @throws ERR_SHAPE; ERR_OPTION; ERR_MEMORY.
   */
  decode(z: Tensor, options: VaeRunOptions = {}): Tensor {
    const run = (): Tensor => drain(this.decodeSteps(z, options))
    return this.#recording(z) ? run() : scope(run)
  }

  /** `decode` that pauses after every layer, for `sliced`; what it makes belongs to the surrounding scope. */
  *decodeSteps(z: Tensor, options: VaeRunOptions = {}): Steps<Tensor> {
    this.#checkLatents(z)
    const plan = this.planDecode(z.shape, options)
    const grid = plan.tile === null ? null : decodeGrid(plan.tile, this.spatialFactor)
    return yield* this.#run(this.#decoder, z, grid, chunkLengths(z.shape[2] as number, plan.window), options)
  }

  /**
   * Decodes a clip unit by unit: the same frames as {@link decode} with the same pieces, as soon as their latents are
   * there. The budget counts what all tiles carry along, and what later units will need. `single`: there will be none, so
   * nothing is carried.
   */
  decodeStream(options: VaePieces & { single?: boolean } = {}): DecodeStream {
    const { single = false, ...pieces } = options
    checkPieces(pieces, this.spatialFactor)
    return new DecodeStream(this.#decoder, {
      check: (z) => this.#checkStream(z),
      plan: (shape, how) => this.#planDecode(shape, pieces, { ...how, stream: !single }),
      carry: !single,
      grid: (tile) => decodeGrid(tile, this.spatialFactor),
    })
  }

  /** The pieces in which {@link encode} would work on a clip of this shape. @throws ERR_OPTION, ERR_MEMORY */
  planEncode(shape: readonly number[], pieces: VaePieces = {}): VaePlan {
    const [f, t] = [this.spatialFactor, this.temporalFactor]
    const [, , frames, h, w] = shape as [number, number, number, number, number]
    const clip = { frames: (frames - 1) / t + 1, height: h / f, width: w / f, factor: f, initial: true }
    return choosePieces(pieces, clip, (plan) =>
      this.#bytes(this.#encoder, {
        shape,
        grid: plan.tile === null ? null : encodeGrid(plan.tile, f),
        lengths: pixelLengths(frames, plan, t),
        initial: true,
        stream: false,
      }),
    )
  }

  /** The pieces in which {@link decode} would work on latents of this shape. @throws ERR_OPTION, ERR_MEMORY */
  planDecode(shape: readonly number[], pieces: VaePieces = {}): VaePlan {
    return this.#planDecode(shape, pieces, { initial: true, stream: false })
  }

  #planDecode(
    shape: readonly number[],
    pieces: VaePieces,
    how: { initial: boolean; stream: boolean; tile?: number | null | undefined },
  ): VaePlan {
    const factor = this.spatialFactor
    const { initial, stream, tile } = how
    const [, , frames, height, width] = shape as [number, number, number, number, number]
    return choosePieces(pieces, { frames, height, width, factor, initial, tile }, (plan) => {
      const grid = plan.tile === null ? null : decodeGrid(plan.tile, factor)
      const lengths = chunkLengths(frames, plan.window, initial)
      const now = this.#bytes(this.#decoder, { shape, grid, lengths, initial, stream })
      if (!stream || !initial) return now
      // The tiles must also do for the units that follow, which are at least one latent frame.
      const next = shape.map((n, i) => (i === 2 ? 1 : n))
      const then = { shape: next, grid, lengths: [1], initial: false, stream }
      return Math.max(now, this.#bytes(this.#decoder, then))
    })
  }

  #bytes(network: VaeNetwork, clip: Omit<PlannedClip, 'borrowed'>): number {
    const { backend, threads } = engine.device
    const { bytes } = DTYPES[this.dtype]
    const type = this.dtype === 'bf16' && !/bf16|amx/.test(backend) ? 'widened' : this.dtype
    const borrowed: PlannedClip['borrowed'] = (x, w, y) =>
      engine.separateMemory ? sizeOf(w) : convolutionBytes(x, w, y, type, threads) / bytes
    return estimateElements(network, { ...clip, borrowed }) * bytes
  }

  *#run(
    network: VaeNetwork,
    x: Tensor,
    grid: TileGrid | null,
    lengths: readonly number[],
    options: VaeRunOptions,
  ): Steps<Tensor> {
    const recording = this.#recording(x)
    const { capture, maxMemory, tile, window } = options
    if (recording && (maxMemory ?? tile ?? window) !== undefined) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'maxMemory, tile and window of the VAE',
        expected: 'none of them while gradients are recorded',
        received: 'a tensor or a parameter that wants a gradient',
        remedy: 'Call it inside noGrad().',
      })
    }
    // Tile by tile, each through all its chunks: only one tile's frames have to be carried.
    return yield* overTiles(x, grid, function* (part) {
      const pass = new Pass({ carry: lengths.length > 1, recording, capture })
      try {
        return yield* overTime(part, lengths, (chunk) => runChunk(network, chunk, pass))
      } finally {
        pass.dispose()
      }
    })
  }

  #recording(x: Tensor): boolean {
    return needsGrad(x) || [...this.parameters.values()].some(needsGrad)
  }

  #checkVideo(x: Tensor): void {
    const [f, t, channels] = [this.spatialFactor, this.temporalFactor, this.config.encoder_in_channels]
    const [, c, frames, h, w] = x.shape as [number, number, number, number, number]
    if (x.rank === 5 && c === channels && frames % t === 1 % t && h % f === 0 && w % f === 0) return
    throw new PyraflowError('ERR_SHAPE', {
      what: 'CausalVideoVAE.encode',
      expected: `[B, ${channels}, 1 + ${t}m, H, W] with H and W multiples of ${f}`,
      received: `[${x.shape}]`,
    })
  }

  #checkLatents(z: Tensor): void {
    if (z.rank === 5 && z.shape[1] === this.config.decoder_in_channels && z.size > 0) return
    throw new PyraflowError('ERR_SHAPE', {
      what: 'CausalVideoVAE.decode',
      expected: `[B, ${this.config.decoder_in_channels}, T, H, W]`,
      received: `[${z.shape}]`,
    })
  }

  #checkStream(z: Tensor): void {
    this.#checkLatents(z)
    if (!this.#recording(z)) return
    throw new PyraflowError('ERR_OPTION', {
      what: 'a stream of frames',
      expected: 'no gradients being recorded',
      received: 'a tensor or a parameter that wants a gradient',
      remedy: 'Call it inside noGrad().',
    })
  }

  /**
   * The decoder's last convolution: its weight, and what it makes of its input, which {@link decode} shows to `capture`
   * as `decoder.conv_out.input`. The bias is left out.
   */
  get lastLayer(): { weight: Tensor; run(input: Tensor, weight: Tensor): Tensor } {
    return {
      weight: this.parameters.get('decoder.conv_out.conv.weight') as Tensor,
      run: (input, weight) => permute(conv3d(input, weight, null, { pad: [2, 1, 1] }), [0, 4, 1, 2, 3]),
    }
  }

  /** Writes config.json and weights as a diffusers-style folder; files appear whole or not at all. */
  async save(dir: string, dtype?: 'f32' | 'bf16'): Promise<void> {
    await writePretrained(
      dir,
      { _class_name: 'CausalVideoVAE', ...this.config },
      tensorsToWrite(this.parameters, dtype),
    )
  }

  dispose(): void {
    this.#weights.dispose()
  }
}

/** mean + std·noise, std = exp(logvar / 2) (spec/vae.md (7)). */
export function samplePosterior(posterior: Posterior, noise: Tensor): Tensor {
  return axpby(posterior.mean, mul(exp(scale(posterior.logvar, 0.5)), noise), 1, 1)
}

/** Mean over batch and channels of ½ Σ(mean² + e^logvar − 1 − logvar), shape [1] (spec/vae.md (8)). */
export function klLoss(posterior: Posterior): Tensor {
  // In f32: the terms nearly cancel.
  const mean = cast(posterior.mean, 'f32')
  const logvar = cast(posterior.logvar, 'f32')
  const [b, c] = mean.shape as [number, number]
  const terms = sub(axpby(square(mean), exp(logvar), 1, 1), logvar)
  return scale(sum(terms), 0.5 / (b * c), (-0.5 * mean.size) / (b * c))
}
