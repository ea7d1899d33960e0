import { PyraflowError } from '../engine/errors.ts'

export interface ScheduleOptions {
  /** Peak learning rate. */
  learningRate: number
  warmupSteps: number
  kind?: 'constant' | 'cosine'
  /** Optimizer steps of the whole run. */
  totalSteps: number
  /** Where cosine ends. */
  minLearningRate?: number
}

/**
 * The learning rate of every optimizer step (spec/training.md §3): constant after a warm-up from 1e-6, or cosine after a
 * warm-up from 0.
 * @throws ERR_OPTION for rates that are no rates, another kind, no steps, or a warm-up longer than the run.
 */
export function learningRates(options: ScheduleOptions): Float64Array {
  const {
    learningRate: lr,
    warmupSteps: warmup,
    kind = 'constant',
    totalSteps,
    minLearningRate: min = 1e-5,
  } = options
  const whole = (n: number): boolean => Number.isSafeInteger(n) && n >= 0
  const checks: [string, boolean, string, unknown][] = [
    ['steps', whole(totalSteps), 'a whole number', totalSteps],
    [
      'warmupSteps',
      whole(warmup) && warmup <= totalSteps,
      `0 to ${totalSteps} (all steps of the run)`,
      warmup,
    ],
    ['learningRate', lr > 0 && Number.isFinite(lr), 'a number above 0', lr],
    ['schedule', kind === 'constant' || kind === 'cosine', 'constant or cosine', kind],
    // A constant rate has no end to come to.
    ['minLearningRate', kind === 'constant' || (min >= 0 && min <= lr), `0 to ${lr} (learningRate)`, min],
  ]
  for (const [what, fine, expected, received] of checks) {
    if (!fine) throw new PyraflowError('ERR_OPTION', { what, expected, received: String(received) })
  }
  const from = kind === 'constant' ? 1e-6 : 0
  const rest = totalSteps - warmup
  return Float64Array.from({ length: totalSteps }, (_, i) => {
    if (i < warmup) return warmup === 1 ? from : from + ((lr - from) * i) / (warmup - 1)
    if (kind === 'constant') return lr
    return min + 0.5 * (lr - min) * (1 + Math.cos((Math.PI * (i - warmup)) / rest))
  })
}

/** The part of a trainer's options that sets the learning rate. */
export interface RateOptions {
  /** Optimizer steps of the whole run. */
  steps: number
  /** Peak learning rate, 1e-4. */
  learningRate?: number
  /** Default: 100, or all steps of a shorter run. */
  warmupSteps?: number
  schedule?: 'constant' | 'cosine'
  /** Where cosine ends, 1e-5. */
  minLearningRate?: number
}

/** `learningRates` of a trainer's options. @throws ERR_OPTION */
export function ratesOf(options: RateOptions, usual: 'constant' | 'cosine'): Float64Array {
  const { steps, learningRate = 1e-4, warmupSteps = Math.min(100, steps), schedule = usual } = options
  const { minLearningRate = 1e-5 } = options
  return learningRates({ learningRate, warmupSteps, kind: schedule, totalSteps: steps, minLearningRate })
}
