import { PyraflowError } from '../../engine/errors.ts'
import type { Steps } from '../../tensor/tape.ts'
import type { AdamW } from '../optimizer.ts'
import type { StepLoss } from './micro-steps.ts'

const POLICIES = ['skip', 'rollback', 'fail'] as const

/** What the user of any trainer may set of its run. */
export interface RunSettings {
  /** Micro-steps whose gradients are averaged into one update, 1. */
  accumulate?: number | undefined
  /** Steps between checkpoints; the last step always writes one. */
  checkpointEvery?: number | undefined
  /** Newest checkpoints kept, 2. */
  keepCheckpoints?: number | undefined
  /** Whether the checkpoint of the lowest validation loss is written at once and kept besides those, true. */
  keepBest?: boolean | undefined
  /** Steps between validations. */
  validateEvery?: number | undefined
  /** Measures the model after `step` steps; `loss` decides which checkpoint is best. */
  validate?: ((step: number) => Promise<{ loss: number } & Record<string, number>>) | undefined
  /** Steps between samples. */
  sampleEvery?: number | undefined
  /** Writes samples into `dir`, an empty folder, and names the files; it becomes `samples-<step>` when all are there. */
  sample?: ((step: number, dir: string) => Promise<string[]>) | undefined
  /**
   * What happens when the loss or a gradient is not finite; the weights never take it up. `skip` (default) goes on with
   * the next data, `rollback` besides puts the weights back to the last checkpoint, `fail` ends the run. At `limit` (5)
   * skipped steps in a row, or rollbacks without a new checkpoint between them, the run ends all the same.
   */
  nonFinite?: { policy?: (typeof POLICIES)[number] | undefined; limit?: number | undefined } | undefined
  /** Skips the update of a step whose loss is this high or higher (spec/training.md §3, 2); off by default. */
  maxLoss?: number | undefined
  /** Whether loss.svg is drawn at every checkpoint, true. */
  plot?: boolean | undefined
}

/** A run as a trainer describes it. */
export interface RunOptions extends RunSettings {
  /** Folder of the run: checkpoints, metrics.jsonl, loss.svg, samples. */
  out: string
  steps: number
  learningRates: Float64Array
  optimizer: AdamW
  /**
   * Optimizers that `forward` steps itself, in the last micro-step of a step and not before; saved and restored with the
   * run under their names.
   */
  companions?: Readonly<Record<string, AdamW>> | undefined
  /** Host work of a micro-step (reading, decoding); runs while the one before it computes. */
  prepare(step: number, micro: number): Promise<unknown>
  /** Queues the forward pass, pausing now and then; the run queues backward and the update. */
  forward(step: number, prepared: never, micro: number): Steps<StepLoss>
  /** Writes the model itself into a checkpoint folder. */
  saveModel(dir: string): Promise<void>
  resume?: boolean
  signal?: AbortSignal | undefined
}

/** The part of a trainer's options that its run takes. @throws ERR_OPTION */
export function runSettings(options: RunSettings): RunSettings {
  const { accumulate, checkpointEvery, keepCheckpoints, keepBest, validateEvery, validate } = options
  const { sampleEvery, sample, nonFinite, maxLoss, plot } = options
  const counts = { accumulate, checkpointEvery, keepCheckpoints, validateEvery, sampleEvery }
  for (const [what, value] of Object.entries({ ...counts, 'nonFinite.limit': nonFinite?.limit })) {
    if (value === undefined || value === Number.POSITIVE_INFINITY) continue
    if (!(Number.isInteger(value) && value > 0)) throw wrong(what, 'a whole number of 1 or more', value)
  }
  if (maxLoss !== undefined && !(maxLoss > 0)) throw wrong('maxLoss', 'a number above 0', maxLoss)
  const { policy } = nonFinite ?? {}
  if (policy !== undefined && !POLICIES.includes(policy))
    throw wrong('nonFinite.policy', POLICIES.join(', '), policy)
  return { ...counts, keepBest, validate, sample, nonFinite, maxLoss, plot }
}

/** @throws ERR_OPTION for settings that mean nothing, alone or together */
export function checkRun(options: RunOptions): void {
  runSettings(options)
  const { accumulate, validate, validateEvery, sample, sampleEvery } = options
  if (accumulate === Number.POSITIVE_INFINITY) throw wrong('accumulate', 'a finite number', accumulate)
  for (const [every, hook, name] of [
    [validateEvery, validate, 'validate'],
    [sampleEvery, sample, 'sample'],
  ] as const) {
    if ((every === undefined) !== (hook === undefined))
      throw wrong(`${name}, ${name}Every`, 'both or none', `only ${hook ? name : `${name}Every`}`)
  }
}

function wrong(what: string, expected: string, received: unknown): PyraflowError {
  return new PyraflowError('ERR_OPTION', { what, expected, received: String(received) })
}
