import { PyraflowError } from '../engine/errors.ts'
import { checkStage, type Stages } from './stages.ts'

/** How a latent enters stage k: `latent ← alpha·Up2(latent) + beta·n'`, with `n'` correlated by `gamma`. */
export interface JumpCoefficients {
  /** α (eq. 23). */
  readonly alpha: number
  /** β (eq. 24). */
  readonly beta: number
  /** γ of the block noise (eq. 25). */
  readonly gamma: number
}

/**
 * Coefficients of the jump into stage `k` ≥ 1 (spec/method.md §6): nearest upsampling correlates the
 * noise inside each 2×2 block, and the added block noise, correlated the other way, makes it white again.
 *
 * @throws PyraflowError `ERR_OPTION` for stage 0, which starts from pure noise, or an unknown stage.
 */
export function jumpCoefficients(stages: Stages, k: number): JumpCoefficients {
  checkStage(stages, k)
  if (k === 0) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'jump into a stage',
      expected: 'a stage from 1',
      received: '0',
      remedy: 'Stage 0 starts from pure noise and has no jump',
    })
  }
  const { gamma } = stages
  const signal = 1 - stages.originalStart[k]
  const alpha = 1 / (Math.sqrt(1 + 1 / gamma) * (1 - signal) + signal) // (23)
  const beta = (alpha * (1 - signal)) / Math.sqrt(gamma) // (24)
  return Object.freeze({ alpha, beta, gamma })
}
