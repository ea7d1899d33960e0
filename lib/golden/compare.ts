import type { Tensor } from '../tensor/tensor.ts'
import type { Check } from './types.ts'

/** ‖a − e‖₂ / ‖e‖₂; infinite when lengths differ or a value is not a number. */
export function relativeL2(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY
  let difference = 0
  let norm = 0
  for (let i = 0; i < expected.length; i++) {
    const e = expected[i] as number
    const d = (actual[i] as number) - e
    difference += d * d
    norm += e * e
  }
  if (Number.isNaN(difference)) return Number.POSITIVE_INFINITY
  if (norm === 0) return difference === 0 ? 0 : Number.POSITIVE_INFINITY
  return Math.sqrt(difference / norm)
}

/** Largest absolute difference; infinite when lengths differ or a value is not a number. */
export function maxAbsolute(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY
  let worst = 0
  for (let i = 0; i < expected.length; i++) {
    const d = Math.abs((actual[i] as number) - (expected[i] as number))
    if (!(d <= worst)) worst = Number.isNaN(d) ? Number.POSITIVE_INFINITY : d
  }
  return worst
}

/** Share of values that differ by more than `slack`. */
export function shareBeyond(actual: ArrayLike<number>, expected: ArrayLike<number>, slack: number): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY
  let count = 0
  for (let i = 0; i < expected.length; i++) {
    if (!(Math.abs((actual[i] as number) - (expected[i] as number)) <= slack)) count++
  }
  return count / Math.max(expected.length, 1)
}

/** 0 when both are the same JSON, else 1: for plans, shapes and masks, which must be exact. */
export function exact(name: string, actual: unknown, expected: unknown): Check {
  return { name, error: JSON.stringify(actual) === JSON.stringify(expected) ? 0 : 1, tolerance: 0 }
}

/** |a − e| / |e|, and 0 when both are equal: a recorded 0 must be met exactly. */
export function scalar(name: string, actual: number, expected: number, tolerance: number): Check {
  if (actual === expected) return { name, error: 0, tolerance }
  const error = Math.abs(actual - expected) / Math.abs(expected)
  return { name, error: Number.isNaN(error) ? Number.POSITIVE_INFINITY : error, tolerance }
}

/** Reads `actual` and compares it with recorded floats; a wrong shape is an infinite error. */
export async function compare(
  name: string,
  actual: Tensor,
  expected: { readonly values: Float32Array; readonly shape: readonly number[] },
  tolerance: number,
): Promise<Check> {
  const fits = JSON.stringify(actual.shape) === JSON.stringify(expected.shape)
  return {
    name: fits ? name : `${name}: [${actual.shape}] instead of [${expected.shape}]`,
    error: fits ? relativeL2(await actual.floats(), expected.values) : Number.POSITIVE_INFINITY,
    tolerance,
  }
}

/** round(linspace(0, n − 1, min(n, k))), half to even: where the recorded samples of a tensor were taken. */
export function sampleIndices(n: number, k: number): number[] {
  const count = Math.min(n, k)
  if (count <= 1) return count === 1 ? [0] : []
  const step = (n - 1) / (count - 1)
  return Array.from({ length: count }, (_, i) => {
    if (i === count - 1) return n - 1
    const at = i * step
    const low = Math.floor(at)
    const rest = at - low
    if (rest === 0.5) return low % 2 === 0 ? low : low + 1
    return rest < 0.5 ? low : low + 1
  })
}

/** What a case records about gradients. */
export interface GradientRecord {
  /** [name, ‖g‖₂, Σ g] of every parameter; some records leave the sum out. */
  readonly rows: readonly (readonly [string, number, number?])[]
  /** Sampled or complete entries of a parameter, where recorded. */
  values(name: string): Float32Array | undefined
}

/**
 * Gradients against a record: each parameter's recorded entries (or its norm, where none are) by relative L2, and
 * its sum relative to √n·‖g‖, which is the size of the sum's own rounding. A gradient below 1e-6 of the whole is
 * structurally zero (a key bias under softmax, say) and nothing but rounding: its unit is the whole.
 */
export async function compareGradients(
  gradients: (name: string) => Tensor | null | undefined,
  record: GradientRecord,
  tolerance: number,
): Promise<Check[]> {
  const whole = Math.sqrt(record.rows.reduce((sum, [, norm]) => sum + norm * norm, 0))
  let worst: Check = { name: 'gradients', error: 0, tolerance }
  for (const [name, norm, sum] of record.rows) {
    const tensor = gradients(name)
    if (!tensor) {
      if (norm > 0)
        return [{ name: `gradient of ${name} is missing`, error: Number.POSITIVE_INFINITY, tolerance }]
      continue
    }
    const g = await tensor.floats()
    const unit = norm < whole * 1e-6 ? whole : norm
    const values = record.values(name)
    let difference = 0
    if (values) {
      const at = values.length === g.length ? undefined : sampleIndices(g.length, values.length)
      let sampled = 0
      values.forEach((v, i) => {
        difference += ((g[at ? (at[i] as number) : i] as number) - v) ** 2
        sampled += v * v
      })
      // A sample of a gradient that happens to hold only small entries is judged by its fair share of the norm.
      const share = unit * Math.sqrt(values.length / g.length)
      difference = Math.sqrt(difference) / Math.max(Math.sqrt(sampled), share * 0.1)
    }
    let mine = 0
    let total = 0
    for (const v of g) {
      mine += v * v
      total += v
    }
    const ofSum = sum === undefined ? 0 : Math.abs(total - sum) / (unit * Math.sqrt(g.length))
    const error = Math.max(difference, Math.abs(Math.sqrt(mine) - norm) / unit, ofSum)
    if (!(error <= worst.error)) {
      worst = {
        name: `gradient of ${name}`,
        error: Number.isNaN(error) ? Number.POSITIVE_INFINITY : error,
        tolerance,
      }
    }
  }
  return [worst]
}
