import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { openSafetensors, type Safetensors } from '../lib/io/safetensors.ts'

/** Folder holding the recorded cases: found from this file, so compiled tests (dist/test) work too. */
export const goldenFolder: string = findGoldenFolder()

/** One recorded case: its JSON and, opened on first use, its tensor files. */
export interface Golden {
  readonly name: string
  readonly folder: string
  // biome-ignore lint/suspicious/noExplicitAny: every case has its own JSON layout
  readonly json: any
  /** The case's `tensors.safetensors`. */
  readonly tensors: Safetensors
  /** Any other file of the case, for example `full_grads.safetensors`. */
  open(file: string): Safetensors
}

/** Opens the recorded case `name` of test/golden. */
export function golden(name: string): Golden {
  const folder = join(goldenFolder, name)
  const opened = new Map<string, Safetensors>()
  const open = (file: string): Safetensors => {
    const known = opened.get(file)
    if (known) return known
    const fresh = openSafetensors(join(folder, file))
    opened.set(file, fresh)
    return fresh
  }
  return {
    name,
    folder,
    json: JSON.parse(readFileSync(join(folder, 'case.json'), 'utf8')),
    get tensors(): Safetensors {
      return open('tensors.safetensors')
    },
    open,
  }
}

/** ‖actual − expected‖₂ / ‖expected‖₂; infinite when lengths differ or a value is not a number. */
export function relativeL2(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  if (actual.length !== expected.length) return Number.POSITIVE_INFINITY
  let difference = 0
  let norm = 0
  for (let i = 0; i < expected.length; i++) {
    const e = expected[i]
    const d = actual[i] - e
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
    const d = Math.abs(actual[i] - expected[i])
    if (!(d <= worst)) worst = Number.isNaN(d) ? Number.POSITIVE_INFINITY : d
  }
  return worst
}

function findGoldenFolder(): string {
  const here = dirname(fileURLToPath(import.meta.url))
  for (const candidate of [join(here, 'golden'), join(here, '..', '..', 'test', 'golden')]) {
    try {
      readFileSync(join(candidate, 'scheduler_0', 'case.json'))
      return candidate
    } catch {}
  }
  return join(here, 'golden')
}
