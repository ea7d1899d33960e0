import { PyraflowError } from '../engine/errors.ts'
import { defaultNegativePrompt, promptSuffix } from '../models/presets.ts'
import { type EncodeOptions, emitWarning, type TextEncoder, type TextFeatures } from './encoder.ts'
import { PromptNetworks, type PromptTokens } from './prompt-networks.ts'
import { PromptTokenizers } from './prompt-tokenizers.ts'
import type { T5Options } from './t5-encoder.ts'

/** How to load the text encoder of a published model. */
export interface PromptEncoderOptions extends T5Options {
  /** Is told when a prompt was cut. Default: `process.emitWarning`. */
  readonly onWarning?: (message: string) => void
}

/** The text encoder of a published model: its tokenizers and its networks (spec/text.md). */
export class PromptEncoder implements TextEncoder {
  readonly promptSuffix: string = promptSuffix
  readonly negativePrompt: string = defaultNegativePrompt
  readonly maxLength: number
  readonly networks: PromptNetworks
  readonly tokenizers: PromptTokenizers
  readonly #warn: (message: string) => void

  /** @throws ERR_CHECKPOINT when the tokenizers make longer rows than the networks have places for. */
  constructor(
    networks: PromptNetworks,
    tokenizers: PromptTokenizers,
    options: Pick<PromptEncoderOptions, 'onWarning'> = {},
  ) {
    this.networks = networks
    this.tokenizers = tokenizers
    this.maxLength = tokenizers.t5Length
    this.#warn = options.onWarning ?? emitWarning
    const places = Math.min(...networks.clip.map((model) => model.config.positions))
    if (tokenizers.clip.length === networks.clip.length && tokenizers.clipLength <= places) return
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: 'CLIP tokenizers',
      expected: `${networks.clip.length}, of at most ${places} tokens`,
      received: `${tokenizers.clip.length}, of ${tokenizers.clipLength}`,
      remedy: 'Check that tokenizers and text encoders belong to one model.',
    })
  }

  /**
   * Loads the tokenizers and networks of a model folder.
   *
   * @throws ERR_IO when a folder or file is missing; ERR_CHECKPOINT when one holds something else.
   */
  static async fromPretrained(dir: string, options: PromptEncoderOptions = {}): Promise<PromptEncoder> {
    const { onWarning, ...rest } = options
    // First the small files: whoever lacks one should not wait for gigabytes to learn it.
    const tokenizers = PromptTokenizers.fromPretrained(dir)
    const networks = await PromptNetworks.fromPretrained(dir, rest)
    try {
      return new PromptEncoder(networks, tokenizers, onWarning ? { onWarning } : {})
    } catch (error) {
      networks.dispose()
      throw error
    }
  }

  get jointDim(): number {
    return this.networks.jointDim
  }

  get pooledDim(): number {
    return this.networks.pooledDim
  }

  /** Tokens of R prompts, padded; warns of what does not fit. */
  tokenize(prompts: readonly string[], onWarning: (message: string) => void = this.#warn): PromptTokens {
    return this.tokenizers.encode(prompts, onWarning)
  }

  /**
   * Features of R prompts as they are, without suffix; '' is the null condition. The caller disposes them.
   *
   * @throws ERR_OPTION for no prompts; ERR_ABORTED
   */
  async encode(prompts: readonly string[], options: EncodeOptions = {}): Promise<TextFeatures> {
    if (prompts.length === 0) {
      throw new PyraflowError('ERR_OPTION', { what: 'prompts', expected: 'one or more', received: 'none' })
    }
    return this.networks.forward(this.tokenize(prompts, options.onWarning), options)
  }

  /** Frees the networks. */
  dispose(): void {
    this.networks.dispose()
  }
}
