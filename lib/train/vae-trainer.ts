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
import type { Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { ClipBatch, Dataset } from './dataset.ts'
import { AdamW, type AdamWOptions } from './optimizer.ts'
import { runTraining, type StepLoss, type TrainEvent } from './run.ts'
import { type RateOptions, ratesOf } from './schedule.ts'

/** Random windows of a clip. Single frames teach colours and outlines at a fraction of the cost of moving ones. */
export interface VaeCrop {
  /** Pixels a side, a multiple of the VAE's spatial factor. */
  size: number
  /** 1 + a multiple of the VAE's temporal factor. */
  frames: number
  /** Windows cut out of each clip, 1. */
  perClip?: number
  /** First step that uses this crop, 0. */
  from?: number
  /** First step that no longer does; none by default. */
  until?: number
}

export interface VaeTrainerOptions extends RateOptions {
  model: CausalVideoVAE
  data: Dataset
  out: string
  batchSize: number
  seed?: number
  /** What a step cuts out of every clip; several take turns, step by step. Default: the whole clip. */
  crops?: readonly VaeCrop[]
  /** Weight of the KL term (λ_kl); the reconstruction term weighs 1. */
  klWeight?: number
  optimizer?: AdamWOptions
  checkpointEvery?: number
}

function activeCrops(crops: readonly VaeCrop[], step: number): VaeCrop[] {
  return crops.filter((c) => step >= (c.from ?? 0) && step < (c.until ?? Number.POSITIVE_INFINITY))
}

/** Cuts windows out of every clip of [B, C, T, H, W], each at a place of its own; offsets in steps of 8 pixels. */
function windows(x: Tensor, { size, frames, perClip = 1 }: VaeCrop, draw: (i: number) => number): Tensor {
  const [batch, , t, h, w] = x.shape as [number, number, number, number, number]
  const parts: Tensor[] = []
  for (let b = 0; b < batch; b++) {
    const clip = slice(x, 0, b, 1)
    for (let i = 0; i < perClip; i++) {
      const first = parts.length * 3
      const place = (axis: number, room: number, unit: number): number =>
        Math.floor(draw(first + axis) * (room / unit + 1)) * unit
      const part = slice(clip, 2, place(0, t - frames, 1), frames)
      const rows = slice(part, 3, place(1, h - size, 8), size)
      parts.push(slice(rows, 4, place(2, w - size, 8), size))
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
    const { crops = [], data, model, steps } = options
    const { width, height, frames } = data.options
    for (const crop of crops) {
      const whole = crop.size % model.spatialFactor === 0 && (crop.frames - 1) % model.temporalFactor === 0
      if (!whole || crop.size > Math.min(width, height) || crop.frames > frames) {
        throw new PyraflowError('ERR_OPTION', {
          what: 'crops',
          expected: `a multiple of ${model.spatialFactor} pixels and 1 + a multiple of ${model.temporalFactor} frames within ${width}×${height}×${frames}`,
          received: `${crop.size} pixels, ${crop.frames} frames`,
        })
      }
    }
    // The crops in use change only where one begins or ends.
    const changes = [0, ...crops.flatMap((c) => [c.from ?? 0, c.until ?? 0])].filter((step) => step < steps)
    const idle = crops.length > 0 && changes.find((step) => activeCrops(crops, step).length === 0)
    if (typeof idle === 'number') {
      throw new PyraflowError('ERR_OPTION', {
        what: 'crops',
        expected: 'at least one crop in use at every step',
        received: `none at step ${idle}`,
      })
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
        learningRates: ratesOf(o, 'cosine'),
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

  *#forward(step: number, batch: ClipBatch, generator: Generator, seed: number): Steps<StepLoss> {
    const { model, data, crops = [], klWeight = 1e-6 } = this.#options
    const { frames, height, width } = data.options
    const bytes = Tensor.from(batch.frames, [batch.text.length, frames, height, width, 3])
    let x = framesDecode(bytes)
    const active = activeCrops(crops, step)
    const crop = active[step % active.length]
    if (crop) x = windows(x, crop, (i) => uniformAt(seed, step * 4096 + i))
    yield
    const posterior = model.encode(cast(x, model.dtype))
    yield
    const noise = generator.stream('posterior', step).normal(posterior.mean.shape, { dtype: model.dtype })
    const decoded = model.decode(samplePosterior(posterior, noise))
    yield
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
