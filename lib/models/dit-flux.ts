import { readConfig } from '../io/pretrained.ts'
import { linearLayer } from '../nn/linear.ts'
import { Weights } from '../nn/weights.ts'
import { concat, slice } from '../ops/copy.ts'
import { packTokens } from '../ops/patchify.ts'
import { Generator } from '../tensor/generator.ts'
import { drain, type Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { doubleBlock, singleBlock } from './blocks.ts'
import { checkFluxConfig, FLUX_CLASS, type FluxConfig } from './flux-config.ts'
import { NETWORK_KEYS, networkParts, PackedNetwork, runDouble, type Trunk } from './packed-network.ts'
import type { TransformerOptions } from './velocity-network.ts'

export { type FluxConfig, parameterCount } from './flux-config.ts'
export type { TransformerInputs, TransformerOptions } from './velocity-network.ts'

/**
 * The flux-variant velocity network of Pyramid Flow (spec/dit-flux.md): packed columns of clips, their times and
 * their text in; the velocity of every column's last clip out.
 */
export class PyramidFluxTransformer extends PackedNetwork<FluxConfig> {
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
    return Weights.load(dir, { ...options, ...NETWORK_KEYS }, (w) => PyramidFluxTransformer.#steps(config, w))
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
    return drain(PyramidFluxTransformer.createSteps(config, options))
  }

  /** `create` that pauses after every block, for `sliced`. */
  static createSteps(
    config: Partial<FluxConfig>,
    options: TransformerOptions & { seed: number | bigint },
  ): Steps<PyramidFluxTransformer> {
    const { seed, ...rest } = options
    const checked = checkFluxConfig(config, 'ERR_OPTION')
    return PyramidFluxTransformer.#steps(checked, Weights.init(new Generator(seed), rest))
  }

  static *#steps(config: FluxConfig, weights: Weights): Steps<PyramidFluxTransformer> {
    const form = {
      className: FLUX_CLASS,
      config,
      latentChannels: config.in_channels / 4,
      headAxes: config.axes_dims_rope,
      trunk: (w: Weights) => fluxTrunk(config, w),
    }
    return new PyramidFluxTransformer(form, yield* networkParts(weights, form))
  }
}

// Two-stream blocks, then blocks over text and latents as one stream (spec/dit-flux.md §7).
function* fluxTrunk(config: FluxConfig, w: Weights): Steps<Trunk> {
  const { num_attention_heads: heads, attention_head_dim: headDim } = config
  const attention = { heads, headDim, eps: 1e-6, textNorm: 'norm_added_', textOutput: true }
  const embedLatent = linearLayer(w.sub('x_embedder'), config.in_channels, heads * headDim)
  const double: ReturnType<typeof doubleBlock>[] = []
  for (let i = 0; i < config.num_layers; i++) {
    double.push(doubleBlock(w.sub('transformer_blocks').sub(i), attention))
    yield
  }
  const single: ReturnType<typeof singleBlock>[] = []
  for (let i = 0; i < config.num_single_layers; i++) {
    single.push(singleBlock(w.sub('single_transformer_blocks').sub(i), attention))
    yield
  }

  return {
    // The reference recomputes one block more than the share suggests.
    recomputes: (i, n, share) => i <= Math.trunc(n * share),
    embed: (clips, layout) => embedLatent(packTokens(clips, layout)),
    *run(latent, text, { arrays, recording, capture, apply }) {
      const streams = yield* runDouble(double, [latent, ...(text ? [text] : [])], { arrays, capture, apply })
      const [x, c] = streams as [Tensor, Tensor | undefined]
      let z = c ? concat([c, x], 0) : x // [R·S + N, d]
      if (c && !recording) for (const t of streams) t.dispose()
      for (const [i, block] of single.entries()) {
        ;[z] = apply(i, single.length, (a, e) => [block(a, e, arrays)], [z]) as [Tensor]
        capture?.(`single_transformer_blocks.${i}`, z)
        yield
      }
      return slice(z, 0, arrays.textTokens, arrays.latentTokens)
    },
  }
}
