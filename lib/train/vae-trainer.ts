import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { type CausalVideoVAE, klLoss, samplePosterior } from '../models/causal-vae.ts'
import { cast } from '../ops/cast.ts'
import { concat, slice } from '../ops/copy.ts'
import { framesDecode } from '../ops/frames.ts'
import { mse } from '../ops/mse.ts'
import { axpby } from '../ops/pointwise.ts'
import { mean } from '../ops/reduce.ts'
import { Generator } from '../tensor/generator.ts'
import { uniformAt } from '../tensor/shuffle.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { ClipBatch, Dataset } from './dataset.ts'
import { AdamW, type AdamWOptions } from './optimizer.ts'
import { runTraining, type TrainEvent } from './run.ts'
import { learningRates } from './schedule.ts'

export interface VaeTrainerOptions {
  model: CausalVideoVAE
  data: Dataset
  out: string
  steps: number
  batchSize: number
  seed?: number
  learningRate?: number
  warmupSteps?: number
  schedule?: 'constant' | 'cosine'
  minLearningRate?: number
  /** A random crop of every clip, `size` pixels a side (`imageSize` while single frames are trained); default: all of it. */
  crop?: { size: number; frames: number; imageSize?: number }
  /**
   * First steps on single frames, three of each clip: colours and outlines are learnt there at a ninth of the cost.
   */
  imageSteps?: number
  /** Weight of the KL term (λ_kl); the reconstruction term weighs 1. */
  klWeight?: number
  optimizer?: AdamWOptions
  checkpointEvery?: number
}

const IMAGES_PER_CLIP = 3

/** Cuts `perClip` windows out of every clip of [B, C, T, H, W], each at a place of its own; offsets in steps of 8 pixels. */
function windows(
  x: Tensor,
  o: { frames: number; height: number; width: number; perClip: number; draw: (i: number) => number },
): Tensor {
  const [batch, , t, h, w] = x.shape as [number, number, number, number, number]
  const parts: Tensor[] = []
  const place = (room: number, unit: number): number =>
    Math.floor(o.draw(parts.length * 3 + draws++) * (room / unit + 1)) * unit
  let draws = 0
  for (let b = 0; b < batch; b++) {
    const clip = slice(x, 0, b, 1)
    for (let i = 0; i < o.perClip; i++) {
      draws = 0
      const frames = slice(clip, 2, place(t - o.frames, 1), o.frames)
      const rows = slice(frames, 3, place(h - o.height, 8), o.height)
      parts.push(slice(rows, 4, place(w - o.width, 8), o.width))
    }
  }
  return concat(parts, 0)
}

/** Trains a causal VAE on clips: mean squared error of a posterior sample's reconstruction plus KL (spec/vae.md §9). */
export class VaeTrainer {
  readonly optimizer: AdamW
  readonly #options: VaeTrainerOptions

  /** @throws ERR_OPTION for a crop that does not fit the data or the VAE. */
  constructor(options: VaeTrainerOptions) {
    const { crop, data, model } = options
    if (crop) {
      const { width, height, frames } = data.options
      const whole = crop.size % model.spatialFactor === 0 && (crop.frames - 1) % model.temporalFactor === 0
      if (!whole || crop.size > Math.min(width, height) || crop.frames > frames) {
        throw new PyraflowError('ERR_OPTION', {
          what: 'crop',
          expected: `a multiple of ${model.spatialFactor} pixels and 1 + a multiple of ${model.temporalFactor} frames within ${width}×${height}×${frames}`,
          received: `${crop.size} pixels, ${crop.frames} frames`,
        })
      }
    }
    this.#options = options
    this.optimizer = new AdamW(model.parameters, { emaDecay: 0.999, ...options.optimizer })
  }

  /** Runs to the last step; resumes from the newest checkpoint in `out` when asked to. */
  async *run(options: { signal?: AbortSignal; resume?: boolean } = {}): AsyncGenerator<TrainEvent> {
    const o = this.#options
    const seed = o.seed ?? 0
    const generator = new Generator(seed)
    const batches = new BatchCursor(o.data, o.batchSize, seed, options.signal)
    try {
      yield* runTraining({
        out: o.out,
        steps: o.steps,
        learningRates: learningRates({
          learningRate: o.learningRate ?? 1e-4,
          warmupSteps: o.warmupSteps ?? Math.min(100, o.steps),
          kind: o.schedule ?? 'cosine',
          totalSteps: o.steps,
          minLearningRate: o.minLearningRate ?? 1e-5,
        }),
        optimizer: this.optimizer,
        prepare: (step) => batches.at(step),
        forward: (step, batch) => this.#forward(step, batch as ClipBatch, generator, seed),
        saveModel: (dir) => this.save(join(dir, 'causal_video_vae')),
        ...(o.checkpointEvery === undefined ? {} : { checkpointEvery: o.checkpointEvery }),
        resume: options.resume ?? false,
        signal: options.signal,
      })
    } finally {
      await batches.close()
    }
  }

  #forward(
    step: number,
    batch: ClipBatch,
    generator: Generator,
    seed: number,
  ): { loss: Tensor; metrics: Record<string, Tensor> } {
    const { model, data, crop, imageSteps = 0, klWeight = 1e-6 } = this.#options
    const { frames, height, width } = data.options
    const bytes = Tensor.from(batch.frames, [batch.text.length, frames, height, width, 3])
    let x = framesDecode(bytes)
    if (crop || step < imageSteps) {
      const images = step < imageSteps
      const size = images ? (crop?.imageSize ?? crop?.size) : crop?.size
      x = windows(x, {
        frames: images ? 1 : (crop?.frames ?? frames),
        height: size ?? height,
        width: size ?? width,
        perClip: images ? IMAGES_PER_CLIP : 1,
        draw: (i) => uniformAt(seed, step * 4096 + i),
      })
    }
    const posterior = model.encode(cast(x, model.dtype))
    const noise = generator.stream('posterior', step).normal(posterior.mean.shape, { dtype: model.dtype })
    const decoded = model.decode(samplePosterior(posterior, noise))
    const reconstruction = mean(mse(decoded, cast(x, decoded.dtype)))
    const kl = klLoss(posterior)
    return { loss: axpby(reconstruction, kl, 1, klWeight), metrics: { reconstruction, kl } }
  }

  /** Writes the moving average of the weights as a diffusers-style folder. */
  async save(dir: string, dtype: 'f32' | 'bf16' = 'f32'): Promise<void> {
    await this.optimizer.saveEma(dir, { _class_name: 'CausalVideoVAE', ...this.#options.model.config }, dtype)
  }

  dispose(): void {
    this.optimizer.dispose()
  }
}

/** Batches by step number: epochs follow one another, each with its own order, so that any step can be asked for. */
class BatchCursor {
  readonly #data: Dataset
  readonly #batchSize: number
  readonly #seed: number
  readonly #signal: AbortSignal | undefined
  #stream: AsyncGenerator<ClipBatch> | undefined
  #next = -1

  constructor(data: Dataset, batchSize: number, seed: number, signal: AbortSignal | undefined) {
    this.#data = data
    this.#batchSize = batchSize
    this.#seed = seed
    this.#signal = signal
    if (data.batchCount(batchSize) < 1) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'batchSize',
        expected: `at most the ${data.length} clips of the data set`,
        received: String(batchSize),
      })
    }
  }

  /** Stops decoding ahead. */
  async close(): Promise<void> {
    await this.#stream?.return(undefined)
  }

  async at(step: number): Promise<ClipBatch> {
    const perEpoch = this.#data.batchCount(this.#batchSize)
    const epoch = Math.floor(step / perEpoch)
    const skip = step % perEpoch
    if (!this.#stream || this.#next !== step || skip === 0) {
      await this.#stream?.return(undefined)
      this.#stream = this.#data.batches({
        batchSize: this.#batchSize,
        seed: this.#seed,
        epoch,
        skip,
        ...(this.#signal ? { signal: this.#signal } : {}),
      })
    }
    this.#next = step + 1
    const { value, done } = await this.#stream.next()
    if (done)
      throw new PyraflowError('ERR_OPTION', { what: 'data set', received: 'fewer batches than announced' })
    return value
  }
}
