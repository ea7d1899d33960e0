import { PyraflowError } from '../engine/errors.ts'
import { checkStage, type Stages } from './stages.ts'

/**
 * Weights of the two end points of a training pair at one stage:
 * `S = startNoise·n + startData·Up2(x_lower)` (eq. 14) and `E = endNoise·n + endData·x` (eq. 15).
 * The point is `r·S + (1 − r)·E` (eq. 16) and the target `S − E` (eq. 17).
 */
export interface CoupleCoefficients {
  readonly startNoise: number
  /** 0 at stage 0, which has no lower stage. */
  readonly startData: number
  /** 0 at the last stage, which ends at data. */
  readonly endNoise: number
  readonly endData: number
}

/** A drawn place inside a stage. */
export interface Position {
  /** j, index into the stage's training tables. */
  readonly index: number
  /** r, 1 at the start of the stage. */
  readonly ratio: number
  /** τ, what the network is told. */
  readonly timestep: number
}

/**
 * End-point weights of stage `k` (eq. 14, 15).
 *
 * @throws PyraflowError `ERR_OPTION` for an unknown stage.
 */
export function coupleCoefficients(stages: Stages, k: number): CoupleCoefficients {
  checkStage(stages, k)
  const startNoise = k === 0 ? 1 : stages.start[k]
  const endNoise = k === stages.count - 1 ? 0 : stages.end[k]
  return Object.freeze({ startNoise, startData: 1 - startNoise, endNoise, endData: 1 - endNoise })
}

/**
 * The training position that a uniform draw `u` in [0, 1) selects at stage `k` (spec/method.md §4).
 *
 * @throws PyraflowError `ERR_OPTION` when `u` is not in [0, 1] or the stage is unknown.
 */
export function drawPosition(u: number, stages: Stages, k: number): Position {
  checkStage(stages, k)
  if (!(u >= 0 && u <= 1)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'uniform draw',
      expected: 'a number in [0, 1)',
      received: String(u),
      remedy: 'Pass the draw as the generator gave it',
    })
  }
  const n = stages.trainTimesteps
  const index = Math.min(Math.trunc(u * n), n - 1)
  return Object.freeze({
    index,
    ratio: stages.sigmasPerStage[k][index],
    timestep: stages.timestepsPerStage[k][index],
  })
}
