import { PyraflowError } from '../engine/errors.ts'

/** What a schedule is made from. */
export interface StageOptions {
  /** N, the length of the training table. */
  readonly trainTimesteps?: number
  /** s, the timestep shift; 1 is the identity. */
  readonly shift?: number
  /** K + 1 rising fractions from 0 to 1: where each stage begins in the table. */
  readonly stageRange?: readonly number[]
  /** γ, the block-noise correlation at a jump, in (0, 1/3]. */
  readonly gamma?: number
}

/** The schedule of all K pyramid stages; index 0 is the lowest resolution. Plain, frozen data. */
export interface Stages {
  readonly trainTimesteps: number
  readonly shift: number
  readonly stageRange: readonly number[]
  readonly gamma: number
  /** K. */
  readonly count: number
  /** a_k, noise share at the start of stage k (eq. 8). */
  readonly start: readonly number[]
  /** b_k, noise share at the end of stage k (eq. 7). */
  readonly end: readonly number[]
  /** o_k, noise share at which stage k − 1 ended (eq. 7). */
  readonly originalStart: readonly number[]
  /** [ρ_k^-, ρ_k^+], the share of the whole flow that stage k covers (eq. 9). */
  readonly timestepRatios: readonly (readonly [number, number])[]
  /** τ_k[j], N entries a stage (eq. 11). */
  readonly timestepsPerStage: readonly Float64Array[]
  /** r[j], N entries a stage (eq. 12). */
  readonly sigmasPerStage: readonly Float64Array[]
  /** σ_i (eq. 5), rounded to float32 as the published models were trained. */
  readonly globalSigmas: Float32Array
  /** T_i (eq. 6), rounded to float32. */
  readonly globalTimesteps: Float32Array
}

/** The steps of one stage at inference (eq. 13). */
export interface StageSteps {
  /** τ_n, `count` entries: what the network is told. */
  readonly timesteps: Float64Array
  /** ς_n, `count + 1` entries, the last 0: local positions; their differences are the Euler increments. */
  readonly sigmas: Float64Array
}

/**
 * Builds the schedule tables (spec/method.md §3) for any number of stages.
 * The global table is float32 and everything after it float64, as in the reference, so that timesteps
 * agree to the last digits.
 *
 * @throws PyraflowError `ERR_OPTION` for a table that does not describe rising stages.
 */
export function makeStages(options: StageOptions = {}): Stages {
  const { trainTimesteps: n = 1000, shift = 1, stageRange = [0, 1 / 3, 2 / 3, 1], gamma = 1 / 3 } = options
  checkOptions(n, shift, stageRange, gamma)
  const count = stageRange.length - 1
  const { sigmas, timesteps } = globalTables(n, shift)

  const start: number[] = []
  const end: number[] = []
  const originalStart: number[] = []
  for (let k = 0; k < count; k++) {
    const first = Math.max(Math.trunc(stageRange[k] * n), 0)
    const last = Math.min(Math.trunc(stageRange[k + 1] * n), n)
    const original = sigmas[first]
    originalStart.push(original)
    end.push(last < n ? sigmas[last] : 0) // (7)
    start.push(k === 0 ? original : correctedStart(original, gamma))
  }

  const lengths = start.map((a, k) => a - end[k])
  const total = lengths.reduce((sum, d) => sum + d, 0)
  const timestepRatios: (readonly [number, number])[] = []
  const timestepsPerStage: Float64Array[] = []
  const sigmasPerStage: Float64Array[] = []
  let passed = 0
  for (let k = 0; k < count; k++) {
    const from = k === 0 ? 0 : passed / total
    passed += lengths[k]
    const to = k === count - 1 ? 1 : passed / total
    timestepRatios.push(Object.freeze([from, to] as const)) // (9)
    const high = timesteps[Math.trunc(from * n)] // (10)
    const low = timesteps[Math.min(Math.trunc(to * n), n - 1)]
    timestepsPerStage.push(linspace(high, low, n + 1).slice(0, n)) // (11)
    sigmasPerStage.push(linspace(1, 0, n + 1).slice(0, n)) // (12)
  }

  return Object.freeze({
    trainTimesteps: n,
    shift,
    stageRange: Object.freeze([...stageRange]),
    gamma,
    count,
    start: Object.freeze(start),
    end: Object.freeze(end),
    originalStart: Object.freeze(originalStart),
    timestepRatios: Object.freeze(timestepRatios),
    timestepsPerStage: Object.freeze(timestepsPerStage),
    sigmasPerStage: Object.freeze(sigmasPerStage),
    globalSigmas: sigmas,
    globalTimesteps: timesteps,
  })
}

/**
 * The `count` steps of stage `k` (eq. 13). Both ends are inclusive and the second end is the last
 * training entry, not the limit, so every step but the last is equally long and the last is 1/N.
 *
 * @throws PyraflowError `ERR_OPTION` for an unknown stage or a count below 1.
 */
export function stageSteps(stages: Stages, k: number, count: number): StageSteps {
  checkStage(stages, k)
  if (!Number.isSafeInteger(count) || count < 1) {
    throw new PyraflowError('ERR_OPTION', {
      what: `steps of stage ${k}`,
      expected: 'an integer from 1',
      received: String(count),
      remedy: 'Give at least one step to every stage',
    })
  }
  const last = stages.trainTimesteps - 1
  const ends = (table: Float64Array): Float64Array => linspace(table[0], table[last], count)
  const sigmas = new Float64Array(count + 1)
  sigmas.set(ends(stages.sigmasPerStage[k]))
  return Object.freeze({ timesteps: ends(stages.timestepsPerStage[k]), sigmas })
}

/** Throws `ERR_OPTION` unless `k` is a stage of this schedule. */
export function checkStage(stages: Stages, k: number): void {
  if (Number.isSafeInteger(k) && k >= 0 && k < stages.count) return
  throw new PyraflowError('ERR_OPTION', {
    what: 'stage',
    expected: `an integer from 0 to ${stages.count - 1}`,
    received: String(k),
    remedy: 'Stages are counted from 0, the lowest resolution',
  })
}

// (8): the noise share to which the jump raises a sample that the previous stage left at `original`.
function correctedStart(original: number, gamma: number): number {
  const signal = 1 - original
  return 1 - (1 / (Math.sqrt(1 + 1 / gamma) * (1 - signal) + signal)) * signal
}

// (5), (6). Rounding after every operation is what float32 arrays do; it shows in the seventh digit of a_k.
function globalTables(n: number, shift: number): { sigmas: Float32Array; timesteps: Float32Array } {
  const f = Math.fround
  const s = f(shift)
  const extra = f(shift - 1)
  const sigmas = new Float32Array(n)
  const timesteps = new Float32Array(n)
  for (let i = 0; i < n; i++) {
    const u = f((n - i) / n)
    const sigma = f(f(s * u) / f(1 + f(extra * u)))
    sigmas[i] = sigma
    timesteps[i] = f(sigma * n)
  }
  return { sigmas, timesteps }
}

function linspace(from: number, to: number, count: number): Float64Array {
  const values = new Float64Array(count)
  const step = count > 1 ? (to - from) / (count - 1) : 0
  for (let i = 0; i < count; i++) values[i] = i * step + from
  if (count > 1) values[count - 1] = to
  return values
}

function checkOptions(n: number, shift: number, range: readonly number[], gamma: number): void {
  const fail = (what: string, expected: string, received: unknown, remedy: string): PyraflowError =>
    new PyraflowError('ERR_OPTION', { what, expected, received: String(received), remedy })
  if (!Number.isSafeInteger(n) || n < 2) {
    throw fail('trainTimesteps', 'an integer from 2', n, 'Published models use 1000')
  }
  if (!(shift > 0 && Number.isFinite(shift))) {
    throw fail('shift', 'a positive number', shift, 'Published models use 1')
  }
  // Above 1/3 no 2×2 block has such a covariance (§6.1).
  if (!(gamma > 0 && gamma <= 1 / 3 + 1e-9)) {
    throw fail('gamma', 'a number above 0 and at most 1/3', gamma, 'Published models use 1/3')
  }
  const at = range.map((fraction) => Math.trunc(fraction * n))
  const rises = at.every((index, k) => k === 0 || index > at[k - 1])
  if (range.length < 2 || range[0] !== 0 || range.at(-1) !== 1 || !rises) {
    throw fail(
      'stageRange',
      'fractions that rise from 0 to 1, each stage at least one training step long',
      `[${range.join(', ')}]`,
      'Published models use [0, 1/3, 2/3, 1]',
    )
  }
}
