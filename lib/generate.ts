import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { abortable } from './engine/abortable.ts'
import { engine } from './engine/engine.ts'
import { PyraflowError } from './engine/errors.ts'
import { denormaliseLatents, type LatentNormalisation, normaliseLatents } from './flow/normalise.ts'
import { makeStages, type StageOptions, type Stages } from './flow/stages.ts'
import { writeFileAtomically } from './io/atomic.ts'
import { loadImage, saveVideo } from './io/image.ts'
import { readJsonObject } from './io/pretrained.ts'
import { CausalVideoVAE, samplePosterior } from './models/causal-vae.ts'
import { loadVelocityNetwork, type NetworkKind, networkKind } from './models/load-network.ts'
import { framesPerSecond, latentNormalisation, samplingPresets } from './models/presets.ts'
import { checkPieces, type VaePieces } from './models/vae-plan.ts'
import type { VelocityNetwork } from './models/velocity-network.ts'
import { cast } from './ops/cast.ts'
import { framesDecode, framesEncode } from './ops/frames.ts'
import { latentFrames, noiseFrames, pixelFrames } from './pyramid/units.ts'
import { type NoiseSource, type SampleEvent, sampleLatents, seededNoise } from './sample.ts'
import { Generator } from './tensor/generator.ts'
import { keep, scope } from './tensor/scope.ts'
import { abortableSteps, sliced } from './tensor/sliced.ts'
import { noGrad, type Steps } from './tensor/tape.ts'
import { Tensor } from './tensor/tensor.ts'
import type { TextEncoder, TextFeatures } from './text/encoder.ts'
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

export interface GenerateOptions {
  prompt: string
  negativePrompt?: string
  /** Pixels; multiples of 8·2^stages, one of the model's sizes unless `allowUntrained`. */
  width?: number
  height?: number
  /** Length: seconds, or at least so many frames. */
  seconds?: number
  frames?: number
  /** A first frame to continue from: a path, decoded and cropped to the size. */
  image?: string
  seed?: number
  steps?: readonly number[]
  videoSteps?: readonly number[]
  guidanceScale?: number
  videoGuidanceScale?: number
  allowUntrained?: boolean
  /** Bytes that decoding may take besides the weights; see {@link VaePieces}. Frames are the whole clip's by default. */
  maxMemory?: number
  signal?: AbortSignal
}

/** What a result was made from; the same recipe gives the same video. */
export type Recipe = Required<
  Omit<GenerateOptions, 'signal' | 'image' | 'frames' | 'seconds' | 'allowUntrained' | 'maxMemory'>
> & {
  frames: number
  fps: number
  image?: string
  maxMemory?: number
  dtype: string
}

export type GenerateEvent =
  | {
      type: 'progress'
      phase: 'denoise' | 'decode'
      unit: number
      stage: number
      done: number
      total: number
      etaMs: number
    }
  /** Decoded frames of one unit, u8 RGB [count, height, width, 3]; `first` counts from the video's first frame. */
  | { type: 'frames'; first: number; frames: Uint8Array; width: number; height: number; count: number }

export interface Video {
  /** u8 RGB [count, height, width, 3]. */
  frames: Uint8Array
  count: number
  width: number
  height: number
  fps: number
  recipe: Recipe
}

/** A generation under way: iterate it for progress and frames, or await `result()`. */
export class Generation implements AsyncIterable<GenerateEvent> {
  readonly #events: AsyncGenerator<GenerateEvent, Video>
  #video: Video | undefined

  constructor(events: AsyncGenerator<GenerateEvent, Video>) {
    this.#events = events
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<GenerateEvent> {
    try {
      for (;;) {
        const { value, done } = await this.#events.next()
        if (done) {
          this.#video ??= value
          return
        }
        yield value
      }
    } finally {
      // A reader that leaves early ends the generation, which frees what it holds.
      await this.#events.return(undefined as never)
    }
  }

  /** Runs to the end and returns the video. */
  async result(): Promise<Video> {
    if (!this.#video) for await (const _ of this) void _
    if (!this.#video) throw new PyraflowError('ERR_ABORTED', { what: 'generation ended without a result' })
    return this.#video
  }

  /** Runs to the end and writes .webp, .gif, .mp4 or a folder of .png, with the recipe in a JSON file beside it. */
  async save(path: string): Promise<Video> {
    const video = await this.result()
    const { frames, width, height, fps, recipe } = video
    await saveVideo(path, frames, { width, height, fps })
    await writeFileAtomically(`${path}.json`, `${JSON.stringify(recipe, null, 2)}\n`)
    return video
  }
}

type UnitEvent = Extract<SampleEvent, { type: 'unit' }>

const VAE_FOLDER = 'causal_video_vae'

/** A text encoder, a DiT and a VAE, loaded from one folder. */
export class Pipeline {
  readonly transformer: VelocityNetwork
  readonly vae: CausalVideoVAE
  readonly text: TextEncoder
  readonly config: PipelineConfig
  readonly stages: Stages
  readonly dtype: 'f32' | 'bf16'

  constructor(parts: {
    transformer: VelocityNetwork
    vae: CausalVideoVAE
    text: TextEncoder
    config: PipelineConfig
    dtype?: 'f32' | 'bf16'
  }) {
    this.transformer = parts.transformer
    this.vae = parts.vae
    this.text = parts.text
    this.config = parts.config
    this.stages = makeStages(parts.config.stages)
    this.dtype = parts.dtype ?? 'f32'
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
      return new Pipeline({ transformer, vae, text, config, dtype })
    } catch (error) {
      transformer?.dispose()
      text.dispose?.()
      throw error
    }
  }

  /** Fills in defaults and checks an option set; nothing is computed. @throws ERR_OPTION */
  resolve(options: GenerateOptions): Recipe {
    const c = this.config
    const preset = options.image === undefined ? samplingPresets.textToVideo : samplingPresets.imageToVideo
    const [width, height] = c.sizes?.[0] ?? [640, 384]
    const fps = c.fps ?? framesPerSecond
    const length =
      options.frames === undefined
        ? { seconds: options.seconds ?? c.seconds ?? 5 }
        : { frames: options.frames }
    const perStage = (name: string, list: readonly number[]): number[] => {
      if (list.length === this.stages.count && list.every((n) => Number.isInteger(n) && n > 0))
        return [...list]
      throw new PyraflowError('ERR_OPTION', {
        what: name,
        expected: `${this.stages.count} positive whole numbers, one a stage`,
        received: `[${list}]`,
      })
    }
    if (typeof options.prompt !== 'string') {
      throw new PyraflowError('ERR_OPTION', {
        what: 'prompt',
        expected: 'a string',
        received: typeof options.prompt,
      })
    }
    const recipe: Recipe = {
      prompt: options.prompt,
      negativePrompt: options.negativePrompt ?? this.text.negativePrompt ?? '',
      width: options.width ?? width,
      height: options.height ?? height,
      frames: pixelFrames(latentFrames({ ...length, fps, framesPerUnit: c.framesPerUnit ?? 1 })),
      fps,
      seed: options.seed ?? 0,
      steps: perStage('steps', options.steps ?? c.steps ?? preset.steps),
      videoSteps: perStage('videoSteps', options.videoSteps ?? c.videoSteps ?? preset.videoSteps),
      guidanceScale: options.guidanceScale ?? c.guidanceScale ?? preset.guidance,
      videoGuidanceScale: options.videoGuidanceScale ?? c.videoGuidanceScale ?? preset.videoGuidance,
      dtype: this.dtype,
      ...(options.image === undefined ? {} : { image: options.image }),
      ...(options.maxMemory === undefined ? {} : { maxMemory: options.maxMemory }),
    }
    checkPieces({ maxMemory: options.maxMemory }, this.vae.spatialFactor)
    const trained = c.sizes
    if (
      trained &&
      !options.allowUntrained &&
      !trained.some(([w, h]) => w === recipe.width && h === recipe.height)
    ) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'size',
        expected: trained.map(([w, h]) => `${w}×${h}`).join(' or '),
        received: `${recipe.width}×${recipe.height}`,
        remedy: 'Pass allowUntrained: true to try it all the same.',
      })
    }
    return recipe
  }

  /** Starts a generation; nothing runs until it is iterated or awaited. @throws ERR_OPTION */
  generate(options: GenerateOptions): Generation {
    const recipe = this.resolve(options)
    return new Generation(this.#events(recipe, options.signal))
  }

  async *#events(recipe: Recipe, signal: AbortSignal | undefined): AsyncGenerator<GenerateEvent, Video> {
    const generator = new Generator(recipe.seed).stream('generate')
    const owned: Tensor[] = []
    const encode = async (prompt: string): Promise<TextFeatures> => {
      const features = await this.text.encode([prompt], { signal })
      owned.push(keep(features.embeds), keep(features.pooled))
      return features
    }
    const { width, height, maxMemory } = recipe
    const stream = this.vae.decodeStream({ maxMemory })
    const job = engine.newJob()
    const parts: Uint8Array[] = []
    let count = 0
    const show = async (latent: Tensor): Promise<GenerateEvent> => {
      const frames = await this.#bytes(latent, {
        begins: count === 0,
        decode: (z) => stream.pushSteps(z),
        signal,
        job,
      })
      parts.push(frames)
      const first = count
      count += frames.length / (width * height * 3)
      return { type: 'frames', first, frames, width, height, count: count - first }
    }
    try {
      const text = await encode(recipe.prompt + (this.text.promptSuffix ?? ''))
      const negative = await encode(recipe.negativePrompt)
      const first =
        recipe.image === undefined ? undefined : await this.encodeImage(recipe.image, recipe, generator)
      if (first) {
        owned.push(first)
        yield await show(first)
      }
      const noise = seededNoise(generator)
      for await (const event of this.#denoise({ recipe, text, negative, noise, first, signal })) {
        if (event.type === 'progress') yield event
        else {
          owned.push(event.latent)
          yield await show(event.latent)
        }
      }
      const frames = new Uint8Array(count * width * height * 3)
      let at = 0
      for (const part of parts) {
        frames.set(part, at)
        at += part.length
      }
      return { frames, count, width, height, fps: recipe.fps, recipe }
    } finally {
      stream.dispose()
      for (const t of owned) t.dispose()
      await engine.idle().catch(() => undefined)
    }
  }

  async *#denoise(job: {
    recipe: Recipe
    text: TextFeatures
    negative: TextFeatures
    noise: NoiseSource
    first: Tensor | undefined
    signal: AbortSignal | undefined
  }): AsyncGenerator<Extract<GenerateEvent, { type: 'progress' }> | UnitEvent> {
    const { recipe, first } = job
    const factor = this.vae.spatialFactor
    const f = this.config.framesPerUnit ?? 1
    const wanted = (recipe.frames - 1) / this.vae.temporalFactor + 1
    const mode = first ? 'i2v' : 't2v'
    const began = performance.now()
    for await (const event of sampleLatents(this.transformer, {
      stages: this.stages,
      frames: noiseFrames(wanted, { framesPerUnit: f, mode }),
      height: recipe.height / factor,
      width: recipe.width / factor,
      text: job.text,
      negative: job.negative,
      steps: recipe.steps,
      videoSteps: recipe.videoSteps,
      guidance: { guidanceScale: recipe.guidanceScale, videoGuidanceScale: recipe.videoGuidanceScale, mode },
      noise: job.noise,
      firstFrame: first,
      framesPerUnit: f,
      signal: job.signal,
    })) {
      if (event.type === 'unit') yield event
      else if (event.type === 'step') {
        const { unit, stage, done, total } = event
        const etaMs = ((performance.now() - began) / done) * (total - done)
        yield { type: 'progress', phase: 'denoise', unit, stage, done, total, etaMs }
      }
    }
  }

  /** A still image as the normalised latent of a first frame [1, C, 1, h, w] (spec/method.md §8.3). */
  async encodeImage(
    path: string,
    size: { width: number; height: number },
    generator: Generator,
  ): Promise<Tensor> {
    const pixels = await loadImage(path, size)
    return keep(
      noGrad(() =>
        scope(() => {
          const x = framesDecode(Tensor.from(pixels, [1, 1, size.height, size.width, 3]))
          const posterior = this.vae.encode(cast(x, this.dtype))
          const noise = generator
            .stream('image')
            .normal(posterior.mean.shape, { dtype: posterior.mean.dtype })
          return normaliseLatents(cast(samplePosterior(posterior, noise), 'f32'), this.config.normalisation)
        }),
      ),
    )
  }

  /** u8 RGB frames [T, H, W, 3] of a whole video's normalised latents [1, C, t, h, w]. */
  async decode(latents: Tensor, signal?: AbortSignal, pieces: VaePieces = {}): Promise<Uint8Array> {
    return await this.#bytes(latents, {
      begins: true,
      decode: (z) => this.vae.decodeSteps(z, pieces),
      signal,
      job: engine.newJob(),
    })
  }

  async #bytes(
    latents: Tensor,
    how: {
      begins: boolean
      decode: (z: Tensor) => Steps<Tensor>
      signal: AbortSignal | undefined
      job: number
    },
  ): Promise<Uint8Array> {
    const { begins, decode, signal, job } = how
    const { config, dtype } = this
    let bytes: Tensor | undefined
    try {
      bytes = await sliced(
        function* () {
          const z = cast(denormaliseLatents(latents, config.normalisation, begins), dtype)
          return framesEncode(yield* abortableSteps(decode(z), signal))
        },
        { grad: false, job },
      )
      await abortable(engine.idle(job), signal, job)
      return (await bytes.read()) as Uint8Array
    } catch (error) {
      // Nobody waits for what is still queued.
      await engine.cancel(job)
      throw error
    } finally {
      bytes?.dispose()
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
