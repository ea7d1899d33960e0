import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { readConfig, writePretrained } from '../io/pretrained.ts'
import { tensorsToWrite } from '../nn/export.ts'
import { Weights } from '../nn/weights.ts'
import { cast } from '../ops/cast.ts'
import { permute, slice } from '../ops/copy.ts'
import { axpby, clamp, exp, mul, scale, square, sub } from '../ops/pointwise.ts'
import { sum } from '../ops/reduce.ts'
import type { Generator } from '../tensor/generator.ts'
import { keep, scope } from '../tensor/scope.ts'
import { noGrad } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { causalConv, frameNorm, type Layer, midBlock, resBlock, spatialUp, temporalUp } from './vae-blocks.ts'
import { startAsResampler } from './vae-init.ts'

/** Fields of the published `causal_video_vae/config.json` that shape the network (spec/vae.md §1). */
export interface CausalVaeConfig {
  encoder_in_channels: number
  encoder_out_channels: number
  encoder_block_out_channels: number[]
  encoder_layers_per_block: number[]
  encoder_spatial_down_sample: boolean[]
  encoder_temporal_down_sample: boolean[]
  encoder_norm_num_groups: number
  decoder_in_channels: number
  decoder_out_channels: number
  decoder_block_out_channels: number[]
  decoder_layers_per_block: number[]
  decoder_spatial_up_sample: boolean[]
  decoder_temporal_up_sample: boolean[]
  decoder_norm_num_groups: number
}

export const CAUSAL_VAE_DEFAULTS: CausalVaeConfig = {
  encoder_in_channels: 3,
  encoder_out_channels: 16,
  encoder_block_out_channels: [128, 256, 512, 512],
  encoder_layers_per_block: [2, 2, 2, 2],
  encoder_spatial_down_sample: [true, true, true, false],
  encoder_temporal_down_sample: [true, true, true, false],
  encoder_norm_num_groups: 32,
  decoder_in_channels: 16,
  decoder_out_channels: 3,
  decoder_block_out_channels: [128, 256, 512, 512],
  decoder_layers_per_block: [3, 3, 3, 3],
  decoder_spatial_up_sample: [true, true, true, false],
  decoder_temporal_up_sample: [true, true, true, false],
  decoder_norm_num_groups: 32,
}

export type Capture = (name: string, value: Tensor) => void

export interface VaeOptions {
  dtype?: 'f32' | 'bf16'
  /** Make the parameters leaves that collect gradients. */
  train?: boolean
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
  readonly #encoder: Layer
  readonly #decoder: Layer
  #capture: Capture | undefined

  private constructor(config: CausalVaeConfig, weights: Weights, dtype: 'f32' | 'bf16') {
    checkConfig(config)
    this.config = config
    this.dtype = dtype
    this.#encoder = this.#buildEncoder(weights)
    this.#decoder = this.#buildDecoder(weights)
    this.parameters = weights.parameters
  }

  /**
   * Loads a diffusers-style folder.
   * @throws ERR_CHECKPOINT naming the missing, extra or mis-shaped key.
   */
  static async fromPretrained(dir: string, options: VaeOptions = {}): Promise<CausalVideoVAE> {
    const config = { ...CAUSAL_VAE_DEFAULTS, ...(readConfig(dir) as Partial<CausalVaeConfig>) }
    const dtype = options.dtype ?? 'f32'
    const weights = Weights.open(dir, { dtype, train: options.train ?? false, stripPrefix: 'vae.' })
    try {
      const vae = new CausalVideoVAE(config, weights, dtype)
      weights.assertAllUsed({ ignorePrefixes: ['loss.'] })
      await weights.checkFinite()
      return vae
    } catch (error) {
      weights.dispose()
      throw error
    }
  }

  /**
   * A new VAE, initialised as spec/vae.md §8 says; `initialLogvar` starts the posterior narrower than 0 would,
   * `resampler` starts the network as plain down- and upsampling ({@link startAsResampler}).
   */
  static create(
    config: Partial<CausalVaeConfig>,
    options: VaeOptions & { generator: Generator; initialLogvar?: number; resampler?: boolean },
  ): CausalVideoVAE {
    const dtype = options.dtype ?? 'f32'
    const weights = Weights.init(options.generator, { dtype, train: options.train ?? false })
    const vae = new CausalVideoVAE({ ...CAUSAL_VAE_DEFAULTS, ...config }, weights, dtype)
    vae.#startCertain(options.initialLogvar ?? 0)
    if (options.resampler) startAsResampler(vae.parameters)
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

  #buildEncoder(root: Weights): Layer {
    const c = this.config
    const w = root.sub('encoder')
    const widths = c.encoder_block_out_channels
    const groups = c.encoder_norm_num_groups
    const layers: Layer[] = [
      this.#named(
        'encoder.conv_in',
        causalConv(w.sub('conv_in'), c.encoder_in_channels, widths[0] as number, 3),
      ),
    ]
    let channels = widths[0] as number
    widths.forEach((width, i) => {
      const block = w.sub(`down_blocks.${i}`)
      const parts: Layer[] = []
      for (let j = 0; j < (c.encoder_layers_per_block[i] as number); j++) {
        parts.push(resBlock(block.sub(`resnets.${j}`), channels, width, groups))
        channels = width
      }
      if (c.encoder_spatial_down_sample[i]) {
        parts.push(causalConv(block.sub('downsamplers.0.conv'), width, width, 3, [1, 2, 2]))
      }
      if (c.encoder_temporal_down_sample[i]) {
        parts.push(causalConv(block.sub('temporal_downsamplers.0.conv'), width, width, 3, [2, 1, 1]))
      }
      layers.push(this.#named(`encoder.down_blocks.${i}`, chain(parts)))
    })
    layers.push(this.#middle('encoder.mid_block', w.sub('mid_block'), channels, groups))
    layers.push(frameNorm(w.sub('conv_norm_out'), channels, groups, true))
    layers.push(
      this.#named('encoder', causalConv(w.sub('conv_out'), channels, 2 * c.encoder_out_channels, 3)),
    )
    layers.push(causalConv(root.sub('quant_conv'), 2 * c.encoder_out_channels, 2 * c.encoder_out_channels, 1))
    return chain(layers)
  }

  #buildDecoder(root: Weights): Layer {
    const c = this.config
    const w = root.sub('decoder')
    const widths = [...c.decoder_block_out_channels].reverse()
    const groups = c.decoder_norm_num_groups
    let channels = widths[0] as number
    const layers: Layer[] = [
      causalConv(root.sub('post_quant_conv'), c.decoder_in_channels, c.decoder_in_channels, 1),
      this.#named('decoder.conv_in', causalConv(w.sub('conv_in'), c.decoder_in_channels, channels, 3)),
      this.#middle('decoder.mid_block', w.sub('mid_block'), channels, groups),
    ]
    widths.forEach((width, i) => {
      const block = w.sub(`up_blocks.${i}`)
      const parts: Layer[] = []
      for (let j = 0; j < (c.decoder_layers_per_block[i] as number); j++) {
        parts.push(resBlock(block.sub(`resnets.${j}`), channels, width, groups))
        channels = width
      }
      if (c.decoder_spatial_up_sample[i]) parts.push(spatialUp(block.sub('upsamplers.0'), width))
      if (c.decoder_temporal_up_sample[i]) {
        const up = temporalUp(block.sub('temporal_upsamplers.0'), width)
        parts.push((x) => up(x, true))
      }
      layers.push(this.#named(`decoder.up_blocks.${i}`, chain(parts)))
    })
    layers.push(frameNorm(w.sub('conv_norm_out'), channels, groups, true))
    layers.push(causalConv(w.sub('conv_out'), channels, c.decoder_out_channels, 3))
    return chain(layers)
  }

  #named(name: string, layer: Layer): Layer {
    return (x) => {
      const y = layer(x)
      this.#capture?.(name, y)
      return y
    }
  }

  #middle(name: string, w: Weights, channels: number, groups: number): Layer {
    const block = midBlock(w, channels, groups, (part, x) => {
      this.#capture?.(`${name}.${part}`, x)
      return x
    })
    return this.#named(name, block)
  }

  /**
   * Posterior of the latents of a clip [B, 3, 1 + 8m, H, W]; H and W multiples of the spatial factor.
   * `capture` sees intermediate results, channels last [B, T, H, W, C].
   * @throws ERR_SHAPE
   */
  encode(x: Tensor, capture?: Capture): Posterior {
    const f = this.spatialFactor
    const t = this.temporalFactor
    const [, c, frames, h, w] = x.shape
    if (
      x.rank !== 5 ||
      c !== this.config.encoder_in_channels ||
      (frames as number) % t !== 1 % t ||
      (h as number) % f ||
      (w as number) % f
    ) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'CausalVideoVAE.encode',
        expected: `[B, ${this.config.encoder_in_channels}, 1 + ${t}m, H, W] with H and W multiples of ${f}`,
        received: `[${x.shape}]`,
      })
    }
    this.#capture = capture
    try {
      const moments = this.#encoder(permute(x, [0, 2, 3, 4, 1]))
      const z = this.latentChannels
      const mean = permute(slice(moments, 4, 0, z), [0, 4, 1, 2, 3])
      const logvar = clamp(permute(slice(moments, 4, z, z), [0, 4, 1, 2, 3]), -30, 20)
      return { mean, logvar }
    } finally {
      this.#capture = undefined
    }
  }

  /**
   * Frames [B, 3, 1 + 8m, 8h, 8w] of latents [B, 16, 1 + m, h, w], nominally in [−1, 1].
   * @throws ERR_SHAPE
   */
  decode(z: Tensor, capture?: Capture): Tensor {
    if (z.rank !== 5 || z.shape[1] !== this.config.decoder_in_channels) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'CausalVideoVAE.decode',
        expected: `[B, ${this.config.decoder_in_channels}, T, H, W]`,
        received: `[${z.shape}]`,
      })
    }
    this.#capture = capture
    try {
      return permute(this.#decoder(permute(z, [0, 2, 3, 4, 1])), [0, 4, 1, 2, 3])
    } finally {
      this.#capture = undefined
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
    for (const p of this.parameters.values()) p.dispose()
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

/** Encodes without a tape and hands the posterior over to the caller. */
export function encodeFrozen(vae: CausalVideoVAE, x: Tensor): Posterior {
  return noGrad(() => {
    const result = scope(() => vae.encode(x))
    return { mean: keep(result.mean), logvar: keep(result.logvar) }
  })
}

function chain(layers: Layer[]): Layer {
  return (x) => layers.reduce((y, layer) => layer(y), x)
}

function checkConfig(c: CausalVaeConfig): void {
  const n = c.encoder_block_out_channels.length
  const lists: (keyof CausalVaeConfig)[] = [
    'encoder_layers_per_block',
    'encoder_spatial_down_sample',
    'encoder_temporal_down_sample',
    'decoder_block_out_channels',
    'decoder_layers_per_block',
    'decoder_spatial_up_sample',
    'decoder_temporal_up_sample',
  ]
  for (const key of lists) {
    const list = c[key]
    if (!Array.isArray(list) || list.length !== n) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `VAE config: ${key}`,
        expected: `a list of ${n} entries, one a block`,
        received: JSON.stringify(list),
      })
    }
  }
}
