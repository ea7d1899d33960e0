import { PyraflowError } from '../engine/errors.ts'
import type { Weights } from '../nn/weights.ts'
import type { Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import {
  causalConv,
  type Estimate,
  type Footprint,
  frameAttention,
  frameNorm,
  inSeries,
  type Layer,
  resBlock,
  type Shape,
  spatialUp,
  temporalUp,
} from './vae-blocks.ts'
import type { Pass } from './vae-pass.ts'

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

/** Encoder or decoder: layers in series, some of whose results have a name. */
export class VaeNetwork {
  readonly #layers: { layer: Layer; name?: string }[] = []

  #add(layer: Layer, name?: string): void {
    this.#layers.push(name === undefined ? { layer } : { layer, name })
  }

  #nameLast(name: string): void {
    const last = this.#layers[this.#layers.length - 1]
    if (last) last.name = name
  }

  #addMiddle(w: Weights, name: string, channels: number, groups: number): void {
    this.#add(resBlock(w.sub('resnets.0'), channels, channels, groups))
    this.#add(frameAttention(w.sub('attentions.0'), channels, groups), `${name}.attentions.0`)
    this.#add(resBlock(w.sub('resnets.1'), channels, channels, groups), name)
  }

  /** Video to moments: `encoder`, then `quant_conv`. Pauses after every block. */
  static *encoder(c: CausalVaeConfig, root: Weights): Steps<VaeNetwork> {
    const net = new VaeNetwork()
    const w = root.sub('encoder')
    const widths = c.encoder_block_out_channels
    const groups = c.encoder_norm_num_groups
    let channels = widths[0] as number
    net.#add(causalConv(w.sub('conv_in'), c.encoder_in_channels, channels, 3), 'encoder.conv_in')
    for (const [i, width] of widths.entries()) {
      const block = w.sub(`down_blocks.${i}`)
      for (let j = 0; j < (c.encoder_layers_per_block[i] as number); j++) {
        net.#add(resBlock(block.sub(`resnets.${j}`), channels, width, groups))
        channels = width
      }
      if (c.encoder_spatial_down_sample[i]) {
        net.#add(causalConv(block.sub('downsamplers.0.conv'), width, width, 3, [1, 2, 2]))
      }
      if (c.encoder_temporal_down_sample[i]) {
        net.#add(causalConv(block.sub('temporal_downsamplers.0.conv'), width, width, 3, [2, 1, 1]))
      }
      net.#nameLast(`encoder.down_blocks.${i}`)
      yield
    }
    net.#addMiddle(w.sub('mid_block'), 'encoder.mid_block', channels, groups)
    const moments = 2 * c.encoder_out_channels
    net.#add(frameNorm(w.sub('conv_norm_out'), channels, groups, true))
    net.#add(causalConv(w.sub('conv_out'), channels, moments, 3), 'encoder')
    net.#add(causalConv(root.sub('quant_conv'), moments, moments, 1))
    return net
  }

  /** Latents to video: `post_quant_conv`, then `decoder`. Pauses after every block. */
  static *decoder(c: CausalVaeConfig, root: Weights): Steps<VaeNetwork> {
    const net = new VaeNetwork()
    const w = root.sub('decoder')
    const widths = [...c.decoder_block_out_channels].reverse()
    const groups = c.decoder_norm_num_groups
    const z = c.decoder_in_channels
    let channels = widths[0] as number
    net.#add(causalConv(root.sub('post_quant_conv'), z, z, 1))
    net.#add(causalConv(w.sub('conv_in'), z, channels, 3), 'decoder.conv_in')
    net.#addMiddle(w.sub('mid_block'), 'decoder.mid_block', channels, groups)
    for (const [i, width] of widths.entries()) {
      const block = w.sub(`up_blocks.${i}`)
      for (let j = 0; j < (c.decoder_layers_per_block[i] as number); j++) {
        net.#add(resBlock(block.sub(`resnets.${j}`), channels, width, groups))
        channels = width
      }
      if (c.decoder_spatial_up_sample[i]) net.#add(spatialUp(block.sub('upsamplers.0'), width))
      if (c.decoder_temporal_up_sample[i]) net.#add(temporalUp(block.sub('temporal_upsamplers.0'), width))
      net.#nameLast(`decoder.up_blocks.${i}`)
      yield
    }
    net.#add(frameNorm(w.sub('conv_norm_out'), channels, groups, true), 'decoder.conv_out.input')
    net.#add(causalConv(w.sub('conv_out'), channels, c.decoder_out_channels, 3))
    return net
  }

  /** Runs a clip or the next chunk of it [B, T, H, W, C], which it frees; pauses after every layer. */
  *run(x: Tensor, pass: Pass): Steps<Tensor> {
    let h = x
    for (const { layer, name } of this.#layers) {
      const y = layer.run(h, pass)
      pass.free(h)
      h = y
      if (name !== undefined) pass.capture?.(name, h)
      yield
    }
    pass.endChunk()
    return h
  }

  /** What {@link run} takes without a tape, in elements. */
  footprint(x: Shape, how: Estimate): Footprint {
    return inSeries(
      this.#layers.map(({ layer }) => layer),
      x,
      how,
    )
  }
}

/** @throws ERR_CHECKPOINT for lists that do not have one entry a block. */
export function checkConfig(c: CausalVaeConfig): void {
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
