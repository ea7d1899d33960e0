import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { writeSafetensors } from '../io/safetensors.ts'
import { type CausalVideoVAE, samplePosterior } from '../models/causal-vae.ts'
import { Lpips } from '../models/lpips.ts'
import { tensorsToWrite } from '../nn/export.ts'
import { cast } from '../ops/cast.ts'
import { concat, slice } from '../ops/copy.ts'
import { framesDecode } from '../ops/frames.ts'
import { Generator } from '../tensor/generator.ts'
import { uniformAt } from '../tensor/shuffle.ts'
import type { Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { ClipBatch, Dataset } from './dataset.ts'
import { AdamW, type AdamWOptions } from './optimizer.ts'
import { type RunSettings, runSettings, runTraining, type StepLoss, type TrainEvent } from './run.ts'
import { gridPath } from './samples.ts'
import { type RateOptions, ratesOf } from './schedule.ts'
import { type AdversarialOptions, type LastLayer, VaeLoss } from './vae-loss.ts'
import { type ReconstructionOptions, reconstructionGrid } from './vae-samples.ts'
import { checkVaeValidation, type VaeValidationLoss, vaeValidationLoss } from './vae-validation.ts'

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

export interface VaeTrainerOptions extends RateOptions, RunSettings {
  model: CausalVideoVAE
  data: Dataset
  out: string
  batchSize: number
  seed?: number
  /** What a step cuts out of every clip; several take turns, step by step. Default: the whole clip. */
  crops?: readonly VaeCrop[]
  /** Weight of the KL term (λ_kl), 1e-6. */
  klWeight?: number
  /** Weight of the mean squared error (λ_px), 1; the published recipe has 10. */
  pixelWeight?: number
  /** Perceptual term: a loaded network and its weight (λ_lp), 1. Off by default. */
  perceptual?: { model: Lpips; weight?: number }
  /** Adversarial term: the discriminator is trained beside the VAE. Off by default. */
  adversarial?: AdversarialOptions & {
    /** Peak learning rate of the discriminator; default: that of the VAE. Schedule and warm-up are the VAE's. */
    learningRate?: number | undefined
    optimizer?: AdamWOptions | undefined
  }
  optimizer?: AdamWOptions
  /** Clips that are not trained on, whose loss `validateEvery` asks for; they may have another size. */
  validation?: Dataset
  /** Clips of `validation` to use; default all. */
  validationClips?: number
  /** Clips shown beside their reconstructions, every so many steps. */
  samples?: ReconstructionOptions
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

/**
 * Trains a causal VAE on clips (spec/vae.md §9): the mean squared error of a posterior sample's reconstruction and KL,
 * and if asked a perceptual distance and a discriminator, which learns from the same reconstructions.
 */
export class VaeTrainer {
  readonly optimizer: AdamW
  readonly loss: VaeLoss
  /** That of the discriminator, if there is one. */
  readonly discriminatorOptimizer: AdamW | null
  readonly #options: VaeTrainerOptions

  /**
   * @throws ERR_OPTION for a crop that does not fit the data or the VAE, or a negative weight; ERR_SHAPE for one that is too
   * small for the perceptual or the adversarial term.
   */
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
    runSettings(options)
    if (options.validation) checkVaeValidation(model, options.validation, options.validationClips)
    this.#options = options
    const { pixelWeight, klWeight, perceptual, adversarial } = options
    this.loss = new VaeLoss({ pixelWeight, klWeight, perceptual, adversarial })
    // At once, not when a late crop or the adversarial term begins.
    const shapes = crops.length > 0 ? crops.map((c) => [c.frames, c.size, c.size]) : [[frames, height, width]]
    for (const shape of shapes) this.loss.checkShape([options.batchSize, 3, ...shape])
    for (const { height, width } of options.validation?.buckets ?? []) {
      if (perceptual) Lpips.checkSize(height, width)
    }
    if (adversarial && ![...adversarial.discriminator.parameters.values()].every((p) => p.requiresGrad)) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'adversarial.discriminator',
        expected: 'one made with { train: true }',
        received: 'one whose parameters want no gradient',
      })
    }
    this.optimizer = new AdamW(model.parameters, { emaDecay: 0.999, ...options.optimizer })
    this.discriminatorOptimizer = adversarial
      ? new AdamW(adversarial.discriminator.parameters, adversarial.optimizer)
      : null
  }

  /** Runs to the last step; resumes from the newest checkpoint in `out` when asked to. */
  async *run(options: { signal?: AbortSignal; resume?: boolean } = {}): AsyncGenerator<TrainEvent> {
    const o = this.#options
    const { seed = 0, accumulate = 1 } = o
    const generator = new Generator(seed)
    const learningRate = o.adversarial?.learningRate
    const rates = ratesOf({ ...o, ...(learningRate === undefined ? {} : { learningRate }) }, 'cosine')
    const batches = new BatchCursor(o.data, o.batchSize, seed, options.signal)
    try {
      yield* runTraining({
        ...runSettings(o),
        ...(o.validation &&
          o.validateEvery !== undefined && { validate: () => this.validate(options.signal) }),
        ...(o.samples?.every !== undefined && {
          sampleEvery: o.samples.every,
          sample: (step: number, dir: string) => this.sample(step, dir, options.signal),
        }),
        out: o.out,
        steps: o.steps,
        learningRates: ratesOf(o, 'cosine'),
        optimizer: this.optimizer,
        companions: this.discriminatorOptimizer ? { discriminator: this.discriminatorOptimizer } : undefined,
        prepare: (step, micro) => batches.at(step * accumulate + micro),
        forward: (step, batch, micro) => this.#forward(step, micro, batch as ClipBatch, generator, rates),
        saveModel: (dir) => this.#saveModels(dir),
        resume: options.resume ?? false,
        signal: options.signal,
      })
    } finally {
      await batches.close()
    }
  }

  /**
   * Loss of the validation clips, with the moving average of the weights. @throws ERR_OPTION without such clips; ERR_IO;
   * ERR_ABORTED
   */
  async validate(signal?: AbortSignal): Promise<VaeValidationLoss> {
    const { model, validation, validationClips: clips } = this.#options
    if (!validation) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'validation',
        expected: 'clips that are not trained on',
        received: 'none',
      })
    }
    return await this.optimizer.withEma(() =>
      vaeValidationLoss(model, this.loss, validation, { clips, signal }),
    )
  }

  /**
   * Writes clips and what the moving average of the weights makes of them as a contact sheet into `dir`, and names it.
   * @throws ERR_IO; ERR_OPTION for a number of clips that is none; ERR_ABORTED
   */
  async sample(step: number, dir: string, signal?: AbortSignal): Promise<string[]> {
    const { model, validation, data, samples } = this.#options
    const path = await gridPath(dir, step)
    const how = { ...samples, signal }
    await this.optimizer.withEma(() => reconstructionGrid(model, validation ?? data, how, path))
    return [path]
  }

  *#forward(
    step: number,
    micro: number,
    batch: ClipBatch,
    generator: Generator,
    rates: Float64Array,
  ): Steps<StepLoss> {
    const { model, data, crops = [], seed = 0, accumulate = 1 } = this.#options
    // Micro-steps go on through clips and draws as steps do.
    const at = step * accumulate + micro
    const { frames, height, width } = data.options
    const bytes = Tensor.from(batch.frames, [batch.text.length, frames, height, width, 3])
    let x = framesDecode(bytes)
    const active = activeCrops(crops, step)
    const crop = active[at % active.length]
    if (crop) x = windows(x, crop, (i) => uniformAt(seed, at * 4096 + i))
    yield
    const posterior = model.encode(cast(x, model.dtype))
    yield
    const noise = generator.stream('posterior', at).normal(posterior.mean.shape, { dtype: model.dtype })
    let lastLayer: LastLayer | undefined
    const decoded = model.decode(samplePosterior(posterior, noise), {
      capture: (name, input) => {
        if (name !== 'decoder.conv_out.input') return
        const { weight, run } = model.lastLayer
        lastLayer = { weight, run: (w) => run(input, w) }
      },
    })
    yield
    const made = { target: x, decoded, posterior, lastLayer }
    const vae = yield* this.loss.vaeSteps(step, made)
    if (!this.discriminatorOptimizer || !this.loss.adversarialAt(step)) return vae
    // The VAE's loss was taken from the discriminator as it was before this update.
    const judged = yield* this.loss.discriminatorSteps(made, 1 / accumulate)
    if (micro + 1 === accumulate) this.discriminatorOptimizer.step(rates[step] as number)
    return { loss: vae.loss, metrics: { ...vae.metrics, discriminator: judged.loss, ...judged.metrics } }
  }

  async #saveModels(dir: string): Promise<void> {
    await this.save(join(dir, 'causal_video_vae'))
    if (!this.discriminatorOptimizer) return
    const tensors = this.discriminatorOptimizer.masterTensors()
    try {
      await writeSafetensors(join(dir, 'discriminator.safetensors'), tensorsToWrite(tensors))
    } finally {
      for (const t of tensors.values()) t.dispose()
    }
  }

  /** Writes the moving average of the weights as a diffusers-style folder. */
  async save(dir: string, dtype: 'f32' | 'bf16' = 'f32'): Promise<void> {
    await this.optimizer.saveEma(dir, { _class_name: 'CausalVideoVAE', ...this.#options.model.config }, dtype)
  }

  /** Frees the optimizers; the networks stay the caller's. */
  dispose(): void {
    this.optimizer.dispose()
    this.discriminatorOptimizer?.dispose()
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
    if (!this.#stream || this.#next !== step) {
      await this.#stream?.return(undefined)
      this.#stream = this.#data.batches({
        batchSize: this.#batchSize,
        seed: this.#seed,
        epoch,
        epochs: Number.POSITIVE_INFINITY,
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
