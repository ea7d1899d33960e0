import { PyraflowError } from '../engine/errors.ts'

/** How strongly the prompt is followed, unit by unit (spec/method.md §7, §10). */
export interface GuidanceOptions {
  /** g of the first unit, which is an image. */
  readonly guidanceScale: number
  /** g of every later unit. */
  readonly videoGuidanceScale: number
  /** Falling guidance: unit u gets max(guidanceScale − alpha·u, min), whatever its kind. */
  readonly linear?: { readonly alpha?: number; readonly min?: number } | undefined
  /** g of each unit by its index; the last one holds from there on. Overrides all others. */
  readonly perUnit?: readonly number[] | undefined
}

/**
 * The guidance scale of unit `unit`. Guidance is active iff the result is above 0, so 1 still runs both
 * halves of the batch, as the reference does.
 *
 * @throws PyraflowError `ERR_OPTION` for a unit that is none or a scale that is not a number.
 */
export function guidanceForUnit(unit: number, options: GuidanceOptions): number {
  const { guidanceScale, videoGuidanceScale, linear, perUnit } = options
  if (!Number.isSafeInteger(unit) || unit < 0) throw invalid('unit', 'an integer from 0', unit)
  if (perUnit) {
    const g = perUnit[Math.min(unit, perUnit.length - 1)]
    if (g !== undefined && perUnit.every(Number.isFinite)) return g
    throw invalid('guidance', 'finite numbers, one a unit', `[${perUnit}]`)
  }
  if (!Number.isFinite(guidanceScale)) throw invalid('guidanceScale', 'a finite number', guidanceScale)
  if (!Number.isFinite(videoGuidanceScale)) {
    throw invalid('videoGuidanceScale', 'a finite number', videoGuidanceScale)
  }
  if (linear) {
    const { alpha = 0.5, min = 2 } = linear
    if (!Number.isFinite(alpha) || !Number.isFinite(min)) {
      throw invalid('linear guidance', 'finite alpha and min', `alpha ${alpha}, min ${min}`)
    }
    return Math.max(guidanceScale - alpha * unit, min)
  }
  return unit === 0 ? guidanceScale : videoGuidanceScale
}

/**
 * How many steps of each stage are guided where guidance ends after a share `stop` of a unit's steps; they come first.
 *
 * @param counts - steps of the unit, one number a stage
 * @throws PyraflowError `ERR_OPTION` for a share that is not from 0 to 1
 */
export function guidedSteps(counts: readonly number[], stop: number): number[] {
  if (!(stop >= 0 && stop <= 1)) throw invalid('guidanceStop', 'a share of the steps, 0 to 1', stop)
  let left = Math.round(stop * counts.reduce((a, b) => a + b, 0))
  return counts.map((count) => {
    const guided = Math.min(count, left)
    left -= guided
    return guided
  })
}

function invalid(what: string, expected: string, received: unknown): PyraflowError {
  return new PyraflowError('ERR_OPTION', {
    what,
    expected,
    received: String(received),
    remedy: 'Units count from 0; scales of 0 or less turn guidance off',
  })
}
