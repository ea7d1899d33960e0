import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { normaliseLatents } from '../flow/normalise.ts'
import { makeStages, type Stages } from '../flow/stages.ts'
import { samplePosterior } from '../models/causal-vae.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import { concat } from '../ops/copy.ts'
import { mse } from '../ops/mse.ts'
import { mean } from '../ops/reduce.ts'
import { stageLengths } from '../pyramid/lengths.ts'
import { Generator } from '../tensor/generator.ts'
import { shuffle } from '../tensor/shuffle.ts'
import { drain, type Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { ImmediateTextEncoder } from '../text/encoder.ts'
import type { LatentDataset } from './latents.ts'
import { AdamW, type AdamWOptions } from './optimizer.ts'
import { type PairDraws, trainingPairs } from './pairs.ts'
import { type RunSettings, runSettings, runTraining, type StepLoss, type TrainEvent } from './run.ts'
import { type RateOptions, ratesOf } from './schedule.ts'

export interface TrainerOptions extends RateOptions, RunSettings {
  model: VelocityNetwork
  data: LatentDataset
  text: ImmediateTextEncoder
  out: string
  /** Samples a step; a multiple of the columns. */
  batchSize: number
  seed?: number
  stages?: Stages
  /** Columns per stage, [1, 2, 1] in the published recipe; default 1 each, 2 for the middle of three. */
  sampleRatios?: readonly number[]
  framesPerUnit?: number
  corruptRatio?: number
  /**
   * Train on samples of the VAE's posterior, as the published recipe does, or on its means. A posterior that is wide
   * beside its means buries what can be learnt under noise that cannot.
   */
  posterior?: 'sample' | 'mean'
  /** Share of the steps that train first frames alone, as the still images of the published curriculum do; 0. */
  imageRatio?: number
  /** Probability of replacing a caption by the null condition. */
  captionDrop?: number
  optimizer?: AdamWOptions
}

/**
 * Trains the DiT autoregressively with the temporal pyramid (spec/training.md §1–3): every batch trains all stages, each
 * column at one of them, with history lengths that balance the packed sequence.
 */
export class Trainer {
  readonly optimizer: AdamW
  readonly stages: Stages
  readonly columns: readonly number[]
  readonly #options: TrainerOptions

  /** @throws ERR_OPTION when batch size and columns do not fit, or for a share outside 0 to 1. */
  constructor(options: TrainerOptions) {
    this.stages = options.stages ?? makeStages()
    const ratios =
      options.sampleRatios ??
      (this.stages.count === 3 ? [1, 2, 1] : new Array<number>(this.stages.count).fill(1))
    this.columns = ratios.flatMap((n, k) => new Array<number>(n).fill(k))
    if (ratios.length !== this.stages.count || options.batchSize % this.columns.length !== 0) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'batchSize',
        expected: `a multiple of ${this.columns.length} columns (sampleRatios [${ratios}] over ${this.stages.count} stages)`,
        received: String(options.batchSize),
      })
    }
    if (options.data.length < options.batchSize) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'batchSize',
        expected: `at most the ${options.data.length} clips of the data set`,
        received: String(options.batchSize),
      })
    }
    for (const what of ['captionDrop', 'imageRatio', 'corruptRatio'] as const) {
      const value = options[what]
      if (value === undefined || (value >= 0 && value <= 1)) continue
      throw new PyraflowError('ERR_OPTION', {
        what,
        expected: 'a share from 0 to 1',
        received: String(value),
      })
    }
    this.#options = options
    this.optimizer = new AdamW(options.model.parameters, { emaDecay: 0.999, ...options.optimizer })
  }

  /** Runs to the last step; resumes from the newest checkpoint in `out` when asked to. */
  async *run(options: { signal?: AbortSignal; resume?: boolean } = {}): AsyncGenerator<TrainEvent> {
    const o = this.#options
    const { accumulate = 1 } = o
    // Micro-steps go on through clips and draws as steps do.
    const at = (step: number, micro: number): number => step * accumulate + micro
    yield* runTraining({
      ...runSettings(o),
      out: o.out,
      steps: o.steps,
      learningRates: ratesOf(o, 'constant'),
      optimizer: this.optimizer,
      prepare: async (step, micro) => this.indices(at(step, micro)),
      forward: (step, indices, micro) => this.forwardSteps(at(step, micro), indices as number[]),
      saveModel: (dir) => this.save(join(dir, 'diffusion_transformer')),
      resume: options.resume ?? false,
      signal: options.signal,
    })
  }

  /** Clips of a step: epochs of shuffled order laid end to end. */
  indices(step: number): number[] {
    const { data, batchSize, seed = 0 } = this.#options
    const perEpoch = Math.floor(data.length / batchSize)
    const order = shuffle(data.length, seed + Math.floor(step / perEpoch))
    const start = (step % perEpoch) * batchSize
    return Array.from(order.subarray(start, start + batchSize))
  }

  /** Loss of one step; every draw comes from a stream named by the step, so that resuming needs no generator state. */
  forward(step: number, indices: readonly number[]): StepLoss {
    return drain(this.forwardSteps(step, indices))
  }

  /** `forward` that pauses now and then, for `sliced`. */
  *forwardSteps(step: number, indices: readonly number[]): Steps<StepLoss> {
    const {
      model,
      data,
      text,
      seed = 0,
      framesPerUnit = 1,
      captionDrop = 0.1,
      imageRatio = 0,
    } = this.#options
    const generator = new Generator(seed).stream('train', step)
    const posterior = data.gather(indices)
    const drawn =
      this.#options.posterior === 'mean'
        ? posterior.mean
        : samplePosterior(posterior, generator.stream('posterior').normal(posterior.mean.shape))
    const latents = normaliseLatents(drawn, data.normalisation)

    const drops = generator.stream('drop').hostUniform(indices.length)
    const captions = indices.map((i, b) =>
      (drops[b] as number) <= captionDrop ? '' : (data.captions[i] as string),
    )
    const features = text.encode(captions)
    yield
    const frames = data.shape[1] as number
    const still = (generator.stream('still').hostUniform(1)[0] as number) < imageRatio
    const unitsPerStage = still
      ? new Array<number>(this.stages.count).fill(1)
      : stageLengths({
          maxFrames: frames,
          framesPerUnit,
          syncGroup: 1,
          rank: 0,
          counter: step + 1,
          batchUnits: 1 + Math.floor((frames - 1) / framesPerUnit),
          stageCount: this.stages.count,
        })
    const pairs = trainingPairs(latents, this.#draws(generator, latents), {
      stages: this.stages,
      columns: this.columns,
      unitsPerStage,
      framesPerUnit,
      corruptRatio: this.#options.corruptRatio ?? 1 / 3,
    })
    yield
    const predictions = yield* model.forwardSteps({
      columns: pairs.columns,
      timesteps: pairs.timesteps,
      text: features.embeds,
      textMask: features.mask,
      pooled: features.pooled,
      roundTimesteps: false,
    })
    const losses = predictions.map((v, c) => mse(v, pairs.targets[c] as Tensor))
    const metrics: Record<string, Tensor> = {}
    this.columns.forEach((k, c) => {
      if (this.columns.indexOf(k) === c) metrics[`stage${k}`] = mean(losses[c] as Tensor)
    })
    return { loss: mean(losses.length === 1 ? (losses[0] as Tensor) : concat(losses, 0)), metrics }
  }

  #draws(generator: Generator, latents: Tensor): PairDraws {
    const rows = (latents.shape[0] as number) / this.columns.length
    return {
      noise: generator.stream('noise').normal(latents.shape),
      position: (c) => generator.stream('position', c).hostUniform(rows),
      corruption: (c) => generator.stream('corruption', c).hostUniform(rows),
      history: (c, i, shape) => generator.stream('history', c, i).normal(shape),
    }
  }

  /** Writes the moving average of the weights as a diffusers-style folder. */
  async save(dir: string, dtype: 'f32' | 'bf16' = 'f32'): Promise<void> {
    const { model } = this.#options
    await this.optimizer.saveEma(dir, model.modelConfig(), dtype, model.buffers)
  }

  dispose(): void {
    this.optimizer.dispose()
  }
}
