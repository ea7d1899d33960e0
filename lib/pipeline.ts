import { join } from 'node:path'
import { throwIfAborted } from './engine/errors.ts'
import type { LatentNormalisation } from './flow/normalise.ts'
import { makeStages, type StageOptions, type Stages } from './flow/stages.ts'
import { Generation } from './generate/generation.ts'
import { modelHash } from './generate/model-hash.ts'
import type { GenerateOptions } from './generate/options.ts'
import type { Recipe } from './generate/recipe.ts'
import { type Request, resolveOptions } from './generate/resolve.ts'
import { generateVideos } from './generate.ts'
import { folderFingerprint } from './io/fingerprint.ts'
import { loadParts, type PipelineOptions } from './load-pipeline.ts'
import type { AdapterChoice } from './lora/blend.ts'
import type { CausalVideoVAE } from './models/causal-vae.ts'
import type { VelocityNetwork } from './models/velocity-network.ts'
import { type Plan, planVideo } from './plan.ts'
import type { Rates } from './plan-seconds.ts'
import { keep } from './tensor/scope.ts'
import { disposeFeatures, type EncodeOptions, type TextEncoder, type TextFeatures } from './text/encoder.ts'

export type { PipelineOptions } from './load-pipeline.ts'

/** `pyraflow.json` beside the networks: what a trained model needs besides their weights. */
export interface PipelineConfig {
  normalisation: LatentNormalisation
  stages?: StageOptions
  framesPerUnit?: number
  fps?: number
  /** [width, height] in pixels that the model was trained for; others need `allowUntrained`. */
  sizes?: [number, number][]
  steps?: number[]
  videoSteps?: number[]
  guidanceScale?: number
  videoGuidanceScale?: number
  seconds?: number
  /** Appended to every prompt that is not empty. Default: what the text encoder says, for published ones a list of praise. */
  promptSuffix?: string
  /** The negative prompt of callers that give none. Default: what the text encoder says. */
  negativePrompt?: string
}

/** Where the parts of a pipeline were loaded from. */
export interface PipelineSource {
  readonly dir: string
  readonly variant: string
}

/** What a pipeline is made of. */
export interface PipelineParts {
  transformer: VelocityNetwork
  vae: CausalVideoVAE
  text: TextEncoder
  config: PipelineConfig
  dtype?: 'f32' | 'bf16'
  /** How products of the transformer's tokens are rounded. */
  quantize?: 'int8' | undefined
  source?: PipelineSource
  /** Added to the transformer by every generation that does not say otherwise. */
  adapters?: readonly AdapterChoice[]
  /** Most bytes that weights and work together may take. */
  maxMemory?: number | undefined
}

/** A text encoder, a DiT and a VAE, loaded from one folder. */
export class Pipeline {
  readonly transformer: VelocityNetwork
  readonly vae: CausalVideoVAE
  readonly text: TextEncoder
  readonly config: PipelineConfig
  readonly stages: Stages
  readonly dtype: 'f32' | 'bf16'
  /** How products of the transformer's tokens are rounded, if they are. */
  readonly quantize: 'int8' | undefined
  /** Undefined for a pipeline made of parts in memory. */
  readonly source: PipelineSource | undefined
  readonly maxMemory: number | undefined
  /** What generations add to the transformer unless they say otherwise. */
  readonly adapters: readonly AdapterChoice[]
  #hash: Promise<string | undefined> | undefined
  #networkHash: Promise<string | undefined> | undefined

  constructor(parts: PipelineParts) {
    this.transformer = parts.transformer
    this.vae = parts.vae
    this.text = parts.text
    this.config = parts.config
    this.stages = makeStages(parts.config.stages)
    this.dtype = parts.dtype ?? 'f32'
    this.quantize = parts.quantize
    this.source = parts.source
    this.maxMemory = parts.maxMemory
    this.adapters = parts.adapters ?? []
  }

  /**
   * Loads a model folder, published or one of ours: `diffusion_transformer…` of either family, `causal_video_vae`,
   * `text_encoder…`, `tokenizer…` and, where there is one, `pyraflow.json`. Weights are converted once to the type computed in,
   * shared with other pipelines of the same folder (but for the transformer's where there is a `maxMemory`), and while they
   * load the event loop goes on.
   *
   * @throws ERR_CHECKPOINT saying what the folder is or lacks, which file is damaged, or which parts do not belong
   * together; ERR_IO for a file that cannot be read; ERR_DEVICE; ERR_OPTION; ERR_MEMORY; ERR_ABORTED.
   */
  static async load(dir: string, options: PipelineOptions = {}): Promise<Pipeline> {
    return new Pipeline(await loadParts(dir, options))
  }

  /** Fills in defaults and checks an option set; nothing is computed. @throws ERR_OPTION */
  resolve(options: GenerateOptions): Recipe {
    return (resolveOptions(this, options)[0] as Request).recipe
  }

  /**
   * What a generation is going to take, by phase: tokens, operations, bytes, and seconds where the machine's rates are
   * given (`measureRates`). Nothing is computed or allocated. Of a batch it is one video: they are made one after another.
   *
   * @throws ERR_OPTION; ERR_MEMORY when not even the smallest pieces of decoding fit the budget
   */
  async plan(options: GenerateOptions & { rates?: Rates } = {}): Promise<Plan> {
    const { rates, ...rest } = options
    const { prompt = '' } = rest
    const { recipe } = resolveOptions(this, { ...rest, prompt })[0] as Request
    return await planVideo(this, recipe, rates)
  }

  /**
   * Starts a generation; nothing runs until it is iterated or awaited. Several videos are made one after another, so
   * that a batch takes no more memory than one. A recipe is an option set: it makes its video again.
   * @throws ERR_OPTION. What is beyond `maxMemory` ends it before anything is computed, with an ERR_MEMORY that names the
   * largest video that fits; a `resume` folder of another video with ERR_CHECKPOINT.
   */
  generate(options: GenerateOptions): Generation {
    const { signal, previews = false, resume } = options
    const requests = resolveOptions(this, options)
    return new Generation(generateVideos(this, requests, { signal, previews, resume }), signal)
  }

  /** A hash that tells this model from others; undefined for one made of parts, or whose folder is gone. */
  modelHash(): Promise<string | undefined> {
    this.#hash ??= this.source ? modelHash(this.source).catch(() => undefined) : Promise.resolve(undefined)
    return this.#hash
  }

  /** The same of the transformer alone, by which an adapter knows what it was trained on. */
  networkHash(): Promise<string | undefined> {
    const { source } = this
    this.#networkHash ??= source
      ? folderFingerprint(join(source.dir, source.variant)).catch(() => undefined)
      : Promise.resolve(undefined)
    return this.#networkHash
  }

  /**
   * Features of prompts as they are, without suffix, each of one row; the caller disposes them. A prompt at a time, so
   * that its features do not depend on its company.
   */
  async encodePrompts(prompts: readonly string[], options: EncodeOptions = {}): Promise<TextFeatures[]> {
    if (this.text.encodeEach) return this.text.encodeEach(prompts, options)
    const made: TextFeatures[] = []
    try {
      for (const prompt of prompts) {
        throwIfAborted(options.signal, 'text encoding')
        const features = await this.text.encode([prompt], options)
        keep(features.embeds)
        keep(features.pooled)
        made.push(features)
      }
      return made
    } catch (error) {
      for (const features of made) disposeFeatures(features)
      throw error
    }
  }

  dispose(): void {
    this.transformer.dispose()
    this.vae.dispose()
    this.text.dispose?.()
  }
}
