import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import type { Stages } from '../flow/stages.ts'
import type { Rates } from '../plan-seconds.ts'
import { Generator } from '../tensor/generator.ts'
import { drain, type Steps } from '../tensor/tape.ts'
import type { Batch } from './batches.ts'
import { type RehearsedBranch, rehearseTraining } from './dry-run.ts'
import { lossSteps } from './objective.ts'
import { AdamW, TRAINER_OPTIMIZER } from './optimizer.ts'
import { planTrainer, type TrainingPlan } from './plan.ts'
import { runSettings, runTraining, type StepLoss, type TrainEvent } from './run.ts'
import { gridPath, sampleGrid } from './samples.ts'
import { ratesOf } from './schedule.ts'
import { type Resolved, resolveTrainerOptions, type TrainerOptions } from './trainer-options.ts'
import { type ValidationLoss, validationLoss } from './validation.ts'

export type { RehearsedBranch } from './dry-run.ts'
export type { ObjectiveOptions, TrainerOptions } from './trainer-options.ts'

/**
 * Trains a velocity network (spec/training.md §1–3, §6): every batch trains all stages, each column at one of them, on
 * the last unit of clips whose lengths balance the packed sequence, or on whole clips, or on images, or on a mix.
 */
export class Trainer {
  readonly optimizer: AdamW
  readonly stages: Stages
  readonly columns: readonly number[]
  readonly #options: TrainerOptions
  readonly #resolved: Resolved

  /** @throws ERR_OPTION or ERR_SHAPE when options do not fit each other or the data. */
  constructor(options: TrainerOptions) {
    const { model, parameters = model.parameters, checkpointRatio } = options
    this.#options = options
    this.#resolved = resolveTrainerOptions(options)
    this.stages = this.#resolved.objective.stages
    this.columns = this.#resolved.columns
    if (checkpointRatio !== undefined) model.checkpointing = checkpointRatio > 0 && checkpointRatio
    this.optimizer = new AdamW(parameters, { ...TRAINER_OPTIMIZER, ...options.optimizer })
  }

  /** Runs to the last step; resumes from the newest checkpoint in `out` when asked to. */
  async *run(options: { signal?: AbortSignal; resume?: boolean } = {}): AsyncGenerator<TrainEvent> {
    const o = this.#options
    const { validation, samples } = o
    const { signal, resume = false } = options
    yield* runTraining({
      ...runSettings(o),
      ...(validation && o.validateEvery !== undefined ? { validate: () => this.validate() } : {}),
      ...(samples?.every === undefined
        ? {}
        : { sampleEvery: samples.every, sample: (step, dir) => this.sample(step, dir, signal) }),
      ...{ out: o.out, steps: o.steps, learningRates: ratesOf(o, 'constant'), optimizer: this.optimizer },
      prepare: async (step, micro) => this.batch(step, micro),
      forward: (step, batch, micro) => this.forwardSteps(step, batch as Batch, micro),
      saveModel: (dir) => this.save(o.write ? dir : join(dir, 'diffusion_transformer')),
      ...{ resume, signal },
    })
  }

  // Number of a micro-step among all of the run.
  #number(step: number, micro: number): number {
    return step * this.#resolved.accumulate + micro
  }

  /** What a (micro-)step trains on: epochs of shuffled order laid end to end. Steps count from 0. */
  batch(step: number, micro = 0): Batch {
    return this.#resolved.batches.at(this.#number(step, micro))
  }

  /** Loss of one step; every draw comes from a stream named by the step, so that resuming needs no generator state. */
  forward(step: number, batch: Batch, micro = 0): StepLoss {
    return drain(this.forwardSteps(step, batch, micro))
  }

  /** `forward` that pauses now and then, for `sliced`. */
  forwardSteps(step: number, batch: Batch, micro = 0): Steps<StepLoss> {
    const { data, seed = 0, rank = 0 } = this.#options
    const own = new Generator(seed).stream('train', this.#number(step, micro))
    return lossSteps(this.#resolved.objective, data, batch, rank === 0 ? own : own.stream('rank', rank))
  }

  /**
   * Loss of the validation clips, in all and by stage, with the moving average of the weights and the same draws every
   * time. @throws ERR_OPTION without such clips
   */
  async validate(): Promise<ValidationLoss> {
    const { validation, batchSize, validationClips: clips, seed = 0 } = this.#options
    if (!validation) throw missing('validation', 'a source of clips that are not trained on')
    const { columns } = this.#resolved
    const objective = { ...this.#resolved.objective, teacher: undefined }
    return await this.optimizer.withEma(() =>
      validationLoss(objective, validation, { columns, batchSize, clips, seed }),
    )
  }

  /**
   * Writes a contact sheet of the sample prompts into `dir`, made with the moving average of the weights, and names it.
   * @throws ERR_OPTION without sample options; ERR_IO; ERR_NUMERICS; ERR_ABORTED
   */
  async sample(step: number, dir: string, signal?: AbortSignal): Promise<string[]> {
    const { samples } = this.#options
    if (!samples) throw missing('samples', 'prompts and a VAE')
    const path = await gridPath(dir, step)
    await this.optimizer.withEma(() =>
      sampleGrid(
        this.#resolved.objective,
        { ...samples, size: samples.size ?? this.#longest() },
        path,
        signal,
      ),
    )
    return [path]
  }

  // Latent frames, height and width of the longest clips, in whole units.
  #longest(): [number, number, number] {
    const { maxFrames, framesPerUnit: f } = this.#resolved.objective
    const shapes = this.#options.data.buckets.map(({ shape }) => shape as [number, number, number, number])
    const [, frames, height, width] = shapes.reduce((a, b) => (b[1] > a[1] ? b : a))
    return [1 + Math.floor((Math.min(frames, maxFrames) - 1) / f) * f, height, width]
  }

  /**
   * Bytes and operations of a step, and its seconds where the machine's rates are given (`measureRates`); nothing is
   * computed or allocated.
   */
  async plan(options: { rates?: Rates } = {}): Promise<TrainingPlan> {
    return await planTrainer(
      { ...this.#options, ...this.#resolved },
      this.optimizer.parameters,
      options.rates,
    )
  }

  /**
   * Goes once through everything that training will do: forward and backward at every length of every bucket, as video
   * and as image, without captions, validation, samples, and a checkpoint written to `out` and read back. Weights,
   * optimizer and random numbers are afterwards what they were before, bit for bit.
   *
   * @throws what any of it throws: ERR_MEMORY, ERR_NUMERICS naming the part, ERR_IO, ERR_ABORTED
   */
  async rehearse(options: { signal?: AbortSignal } = {}): Promise<RehearsedBranch[]> {
    const { validation, samples } = this.#options
    return await rehearseTraining({
      ...{ ...this.#options, ...this.#resolved, optimizer: this.optimizer, signal: options.signal },
      save: (dir) => this.save(dir),
      validate: validation && (() => this.validate()),
      sample: samples && ((dir) => this.sample(0, dir, options.signal)),
    })
  }

  /** Writes the moving average of the weights as a diffusers-style folder, or as `write` does it. */
  async save(dir: string, dtype: 'f32' | 'bf16' = 'f32'): Promise<void> {
    const { model, causal, write } = this.#options
    if (write) {
      const average = this.optimizer.emaTensors()
      try {
        return await write(dir, average)
      } finally {
        for (const t of average.values()) t.dispose()
      }
    }
    const config = {
      ...model.modelConfig(),
      ...(causal === undefined ? {} : { use_temporal_causal: causal }),
    }
    const trained = new Set(this.optimizer.parameters.values())
    const frozen = [...model.parameters].filter(([, t]) => !trained.has(t))
    await this.optimizer.saveEma(dir, config, dtype, new Map([...model.buffers, ...frozen]))
  }

  dispose(): void {
    this.optimizer.dispose()
  }
}

const missing = (what: string, expected: string): PyraflowError =>
  new PyraflowError('ERR_OPTION', { what, expected, received: 'none', remedy: 'Give it to the trainer.' })
