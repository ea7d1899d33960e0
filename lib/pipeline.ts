import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { PyraflowError } from './engine/errors.ts'
import type { LatentNormalisation } from './flow/normalise.ts'
import { makeStages, type StageOptions, type Stages } from './flow/stages.ts'
import { Generation } from './generate/generation.ts'
import { type GenerateOptions, type Recipe, resolveOptions } from './generate/options.ts'
import { generateVideo } from './generate.ts'
import { readJsonObject } from './io/pretrained.ts'
import { CausalVideoVAE } from './models/causal-vae.ts'
import { loadVelocityNetwork, type NetworkKind, networkKind } from './models/load-network.ts'
import { latentNormalisation } from './models/presets.ts'
import type { VelocityNetwork } from './models/velocity-network.ts'
import { keep } from './tensor/scope.ts'
import { disposeFeatures, type TextEncoder, type TextFeatures } from './text/encoder.ts'
import { loadTextEncoder } from './text/load.ts'

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
}

export interface PipelineOptions {
  dtype?: 'f32' | 'bf16'
  /** Folder name of the transformer when there are several, e.g. `diffusion_transformer_384p`. */
  variant?: string
}

/** Where the parts of a pipeline were loaded from. */
export interface PipelineSource {
  readonly dir: string
  readonly variant: string
}

const VAE_FOLDER = 'causal_video_vae'

/** A text encoder, a DiT and a VAE, loaded from one folder. */
export class Pipeline {
  readonly transformer: VelocityNetwork
  readonly vae: CausalVideoVAE
  readonly text: TextEncoder
  readonly config: PipelineConfig
  readonly stages: Stages
  readonly dtype: 'f32' | 'bf16'
  /** Undefined for a pipeline made of parts in memory. */
  readonly source: PipelineSource | undefined

  constructor(parts: {
    transformer: VelocityNetwork
    vae: CausalVideoVAE
    text: TextEncoder
    config: PipelineConfig
    dtype?: 'f32' | 'bf16'
    source?: PipelineSource
  }) {
    this.transformer = parts.transformer
    this.vae = parts.vae
    this.text = parts.text
    this.config = parts.config
    this.stages = makeStages(parts.config.stages)
    this.dtype = parts.dtype ?? 'f32'
    this.source = parts.source
  }

  /**
   * Loads a model folder: `causal_video_vae`, `diffusion_transformer*` of either family, `pyraflow.json` and what
   * `loadTextEncoder` reads.
   * @throws ERR_CHECKPOINT naming what is missing or does not fit.
   */
  static async load(dir: string, options: PipelineOptions = {}): Promise<Pipeline> {
    const dtype = options.dtype ?? 'f32'
    if (!existsSync(dir)) {
      throw new PyraflowError('ERR_CHECKPOINT', { what: `model folder ${dir}`, received: 'nothing there' })
    }
    const variants = readdirSync(dir).filter((name) => name.startsWith('diffusion_transformer'))
    const variant = options.variant ?? variants[0]
    if (variant === undefined || !variants.includes(variant)) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `model folder ${dir}`,
        expected: options.variant ?? 'a folder diffusion_transformer…',
        received: variants.join(', ') || 'none',
      })
    }
    const config = readPipelineConfig(join(dir, 'pyraflow.json'), networkKind(join(dir, variant)))
    const text = await loadTextEncoder(dir, { dtype })
    let transformer: VelocityNetwork | undefined
    try {
      transformer = await loadVelocityNetwork(join(dir, variant), { dtype })
      checkWidths(dir, text, transformer)
      const vae = await CausalVideoVAE.fromPretrained(join(dir, VAE_FOLDER), { dtype })
      return new Pipeline({ transformer, vae, text, config, dtype, source: { dir, variant } })
    } catch (error) {
      transformer?.dispose()
      text.dispose?.()
      throw error
    }
  }

  /** Fills in defaults and checks an option set; nothing is computed. @throws ERR_OPTION */
  resolve(options: GenerateOptions): Recipe {
    return resolveOptions(this, options)
  }

  /** Starts a generation; nothing runs until it is iterated or awaited. @throws ERR_OPTION */
  generate(options: GenerateOptions): Generation {
    return new Generation(generateVideo(this, this.resolve(options), options.signal))
  }

  /**
   * Features of prompts as they are, without suffix, each of one row; the caller disposes them. A prompt at a time, so
   * that its features do not depend on its company.
   */
  async encodePrompts(
    prompts: readonly string[],
    options: { signal?: AbortSignal | undefined } = {},
  ): Promise<TextFeatures[]> {
    const made: TextFeatures[] = []
    try {
      for (const prompt of prompts) {
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

function readPipelineConfig(path: string, kind: NetworkKind): PipelineConfig {
  const normalisation = latentNormalisation[kind]
  if (!existsSync(path)) return { normalisation }
  const config: Partial<PipelineConfig> = readJsonObject(path, {
    expected: 'settings of the pipeline',
    remedy: 'Check that the file can be read.',
  })
  return { normalisation, ...config }
}

function checkWidths(dir: string, text: TextEncoder, { config }: VelocityNetwork): void {
  const [joint, pooled] = [config.joint_attention_dim, config.pooled_projection_dim]
  if (text.jointDim === joint && text.pooledDim === pooled) return
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: `model folder ${dir}: width of text features`,
    expected: `${joint} and ${pooled} (joint and pooled), which the transformer takes`,
    received: `${text.jointDim} and ${text.pooledDim}`,
    remedy: 'Check that transformer and text encoders belong to one model.',
  })
}
