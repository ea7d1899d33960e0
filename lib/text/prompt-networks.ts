import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { abortable } from '../engine/abortable.ts'
import { engine } from '../engine/engine.ts'
import { throwIfAborted } from '../engine/errors.ts'
import type { ComputeType } from '../nn/weights.ts'
import { concat } from '../ops/copy.ts'
import { abortableSteps, sliced } from '../tensor/sliced.ts'
import type { Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { ClipTextModel, clipClasses } from './clip-text.ts'
import { disposeFeatures, type TextFeatures } from './encoder.ts'
import { type Capture, replaceBy, TextConfig } from './network.ts'
import { T5_CLASSES, T5Encoder, type T5Options } from './t5-encoder.ts'

/** Which text encoders a published model has (spec/text.md): `flux` CLIP and T5, `sd3` two CLIPs and T5. */
export type TextLayout = 'flux' | 'sd3'

interface LayoutParts {
  /** Folder suffixes of the CLIP models, in the order in which their pooled outputs are joined. */
  readonly clip: readonly string[]
  readonly projection: boolean
  readonly t5: string
}

/** The folders `text_encoder…` and `tokenizer…` of each layout, by what follows these names. */
export const textLayouts: Readonly<Record<TextLayout, LayoutParts>> = Object.freeze({
  flux: { clip: [''], projection: false, t5: '_2' },
  sd3: { clip: ['', '_2'], projection: true, t5: '_3' },
})

/** The layout of a model folder: only SD3 models have a third encoder. */
export function textLayoutOf(dir: string): TextLayout {
  return existsSync(join(dir, `text_encoder${textLayouts.sd3.t5}`)) ? 'sd3' : 'flux'
}

/** Widths of the features that a model folder's text encoders give, by their config.json. @throws ERR_IO, ERR_CHECKPOINT */
export function promptWidths(dir: string): { joint: number; pooled: number } {
  const { clip, projection, t5 } = textLayouts[textLayoutOf(dir)]
  const widths = clip.map((suffix) => {
    const c = new TextConfig(join(dir, `text_encoder${suffix}`), clipClasses(projection))
    return c.size(projection ? 'projection_dim' : 'hidden_size')
  })
  const joint = new TextConfig(join(dir, `text_encoder${t5}`), T5_CLASSES).size('d_model')
  return { joint, pooled: widths.reduce((a, b) => a + b, 0) }
}

/** Tokens of R prompts, padded. */
export interface PromptTokens {
  readonly t5: { readonly ids: readonly number[][]; readonly mask: readonly number[][] }
  /** For each CLIP model R rows. */
  readonly clip: readonly (readonly number[][])[]
}

/** How one call is run. */
export interface ForwardOptions {
  readonly signal?: AbortSignal | undefined
  /** Is shown intermediate results while they live: `t5.hidden_states.0`, `clip.0.hidden_states.0`, …. */
  readonly capture?: Capture | undefined
}

/** The text networks of a published model: tokens in, features out. */
export class PromptNetworks {
  readonly layout: TextLayout
  readonly clip: readonly ClipTextModel[]
  readonly t5: T5Encoder

  constructor(layout: TextLayout, clip: readonly ClipTextModel[], t5: T5Encoder) {
    this.layout = layout
    this.clip = clip
    this.t5 = t5
  }

  get dtype(): ComputeType {
    return this.t5.dtype
  }

  get jointDim(): number {
    return this.t5.config.width
  }

  get pooledDim(): number {
    return this.clip.reduce((n, model) => n + model.pooledDim, 0)
  }

  /**
   * Loads the folders `text_encoder`, `text_encoder_2` and, for SD3 models, `text_encoder_3` of a model folder.
   *
   * @throws ERR_IO when a folder, its config.json or a shard is missing; ERR_CHECKPOINT when one holds another network.
   */
  static async fromPretrained(dir: string, options: T5Options = {}): Promise<PromptNetworks> {
    const layout = textLayoutOf(dir)
    const parts = textLayouts[layout]
    const { resident: _, ...rest } = options
    const clip: ClipTextModel[] = []
    try {
      for (const suffix of parts.clip) {
        const { projection } = parts
        const folder = join(dir, `text_encoder${suffix}`)
        clip.push(await ClipTextModel.fromPretrained(folder, { ...rest, projection }))
      }
      const t5 = await T5Encoder.fromPretrained(join(dir, `text_encoder${parts.t5}`), options)
      return new PromptNetworks(layout, clip, t5)
    } catch (error) {
      for (const model of clip) model.dispose()
      throw error
    }
  }

  /** Features of R prompts, as work that pauses after every layer of every network. */
  *forwardSteps(tokens: PromptTokens, capture?: Capture): Steps<TextFeatures> {
    return (yield* this.forwardEachSteps([tokens], capture))[0] as TextFeatures
  }

  /** {@link forwardSteps} of several inputs that do not know of each other, with one pass over the weights of T5. */
  *forwardEachSteps(inputs: readonly PromptTokens[], capture?: Capture): Steps<TextFeatures[]> {
    const from = (network: string): Capture | undefined =>
      capture && ((name, tensor) => capture(`${network}.${name}`, tensor))
    const pooled: Tensor[] = []
    for (const tokens of inputs) {
      const states = []
      for (const [i, model] of this.clip.entries()) {
        states.push(yield* model.forwardSteps(tokens.clip[i] ?? [], from(`clip.${i}`)))
      }
      const [first, second] = states as [Tensor, Tensor?]
      pooled.push(second ? replaceBy(first, (x) => concat([x, second], 1)) : first)
    }
    const embeds = yield* this.t5.forwardEachSteps(
      inputs.map(({ t5 }) => t5),
      from('t5'),
    )
    return inputs.map(({ t5 }, i) => ({
      embeds: embeds[i] as Tensor,
      mask: t5.mask.map((row) => [...row]),
      pooled: pooled[i] as Tensor,
    }))
  }

  /**
   * Features of R prompts, once they are computed; the caller disposes them. The event loop goes on meanwhile.
   *
   * @throws ERR_SHAPE, ERR_OPTION for tokens that do not fit; ERR_ABORTED
   */
  async forward(tokens: PromptTokens, options: ForwardOptions = {}): Promise<TextFeatures> {
    return (await this.forwardEach([tokens], options))[0] as TextFeatures
  }

  /** {@link forward} of several inputs that do not know of each other, with one pass over the weights of T5. */
  async forwardEach(inputs: readonly PromptTokens[], options: ForwardOptions = {}): Promise<TextFeatures[]> {
    const { signal, capture } = options
    throwIfAborted(signal, 'text encoding')
    const job = engine.newJob()
    const steps = (): Steps<TextFeatures[]> =>
      abortableSteps(this.forwardEachSteps(inputs, capture), signal, 'text encoding')
    const features = await sliced(steps, { grad: false, job })
    try {
      await abortable(engine.idle(job), signal, job, 'text encoding')
      return features
    } catch (error) {
      features.forEach(disposeFeatures)
      throw error
    }
  }

  /** Frees the parameters. */
  dispose(): void {
    for (const model of this.clip) model.dispose()
    this.t5.dispose()
  }
}
