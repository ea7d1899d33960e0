import { readConfig } from '../io/pretrained.ts'
import { Weights } from '../nn/weights.ts'
import { slice } from '../ops/copy.ts'
import { packTokens } from '../ops/patchify.ts'
import { Generator } from '../tensor/generator.ts'
import { drain, type Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { doubleBlock } from './blocks.ts'
import { checkMmditConfig, MMDIT_CLASS, type MmditConfig } from './mmdit-config.ts'
import { NETWORK_KEYS, networkParts, PackedNetwork, runDouble, type Trunk } from './packed-network.ts'
import { patchEmbed } from './patch-embed.ts'
import type { TransformerOptions } from './velocity-network.ts'

/**
 * The SD3-variant velocity network of Pyramid Flow (spec/dit-mmdit.md): packed columns of clips, their times and their
 * text in; the velocity of every column's last clip out. Space is told by a fixed table added to the tokens, time by
 * rotation, and the text stream ends before the last block's output.
 */
export class PyramidDiffusionMMDiT extends PackedNetwork<MmditConfig> {
  /**
   * Loads a published model folder, or one of a training run, whose keys may begin with `dit.`. Weights of the type
   * computed in stay in the mapped file; a position table that the file lacks is computed.
   *
   * @throws ERR_IO when the folder cannot be read; ERR_CHECKPOINT naming the key that is missing, unknown, of another
   * shape or not finite, or the field of config.json that is wrong.
   */
  static async fromPretrained(dir: string, options: TransformerOptions = {}): Promise<PyramidDiffusionMMDiT> {
    const config = checkMmditConfig(readConfig(dir), 'ERR_CHECKPOINT')
    return Weights.load(dir, { ...options, ...NETWORK_KEYS }, (w) => PyramidDiffusionMMDiT.#steps(config, w))
  }

  /**
   * A new network, initialised as spec/dit-mmdit.md §5 says; absent fields are as in `MMDIT_DEFAULTS`.
   *
   * @throws ERR_OPTION for a configuration that fits no network.
   */
  static create(
    config: Partial<MmditConfig>,
    options: TransformerOptions & { seed: number | bigint },
  ): PyramidDiffusionMMDiT {
    return drain(PyramidDiffusionMMDiT.createSteps(config, options))
  }

  /** `create` that pauses after every block, for `sliced`. */
  static createSteps(
    config: Partial<MmditConfig>,
    options: TransformerOptions & { seed: number | bigint },
  ): Steps<PyramidDiffusionMMDiT> {
    const { seed, ...rest } = options
    const checked = checkMmditConfig(config, 'ERR_OPTION')
    return PyramidDiffusionMMDiT.#steps(checked, Weights.init(new Generator(seed), rest))
  }

  static *#steps(config: MmditConfig, weights: Weights): Steps<PyramidDiffusionMMDiT> {
    const form = {
      className: MMDIT_CLASS,
      config,
      latentChannels: config.in_channels,
      headAxes: [config.attention_head_dim],
      trunk: (w: Weights) => mmditTrunk(config, w),
    }
    return new PyramidDiffusionMMDiT(form, yield* networkParts(weights, form))
  }
}

function* mmditTrunk(config: MmditConfig, w: Weights): Steps<Trunk> {
  const { num_attention_heads: heads, attention_head_dim: headDim, in_channels: channels } = config
  const embedPatches = patchEmbed(w.sub('pos_embed'), {
    channels,
    width: heads * headDim,
    tableSize: config.pos_embed_max_size,
    baseSize: Math.floor(config.sample_size / config.patch_size),
    interpolate: config.interp_condition_pos,
  })
  const n = config.num_layers
  const blocks: ReturnType<typeof doubleBlock>[] = []
  for (let i = 0; i < n; i++) {
    const form = { heads, headDim, eps: 1e-5, textNorm: 'norm_add_', textOutput: i < n - 1 }
    blocks.push(doubleBlock(w.sub('transformer_blocks').sub(i), form))
    yield
  }

  return {
    recomputes: (i, count, share) => i >= Math.trunc(count * share),
    embed: (clips, layout, capture) => {
      const x = embedPatches(packTokens(clips, layout), layout)
      if (capture) {
        layout.columns.forEach(({ rowOffset, tokens }, c) => {
          capture(`pos_embed.${c}`, slice(x, 0, rowOffset, layout.batch * tokens))
        })
      }
      return x
    },
    *run(latent, text, pass) {
      const [x] = yield* runDouble(blocks, [latent, ...(text ? [text] : [])], pass)
      return x as Tensor
    },
  }
}
