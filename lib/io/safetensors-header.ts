import { PyraflowError } from '../engine/errors.ts'

/** Element types of the safetensors format, with their size in bytes. */
export const dtypeBytes = {
  BOOL: 1,
  U8: 1,
  I8: 1,
  F8_E4M3: 1,
  F8_E5M2: 1,
  I16: 2,
  U16: 2,
  F16: 2,
  BF16: 2,
  I32: 4,
  U32: 4,
  F32: 4,
  I64: 8,
  U64: 8,
  F64: 8,
} as const

/** Name of an element type as a safetensors header spells it. */
export type SafetensorsDtype = keyof typeof dtypeBytes

/** Where one tensor lies. `begin` and `end` are absolute byte offsets in `file`. */
export interface TensorEntry {
  readonly dtype: SafetensorsDtype
  readonly shape: readonly number[]
  readonly begin: number
  readonly end: number
  readonly file: string
}

/**
 * Checks the parsed header of `path`, whose data begin at byte `dataStart` of `size`.
 *
 * @throws PyraflowError `ERR_CHECKPOINT` naming the tensor and what is wrong with it.
 */
export function checkHeader(
  path: string,
  header: unknown,
  dataStart: number,
  size: number,
): { entries: Map<string, TensorEntry>; metadata: Record<string, string> } {
  const fail = (tensor: string, expected: string, received: unknown): PyraflowError =>
    damaged(path, {
      what: tensor,
      expected,
      received: typeof received === 'string' ? received : (JSON.stringify(received) ?? 'nothing'),
      remedy: 'The file is damaged, cut off or was written wrongly; fetch or export it again.',
    })
  if (!isRecord(header)) throw fail('header', 'a JSON object', header)

  const metadata: Record<string, string> = {}
  const entries = new Map<string, TensorEntry>()
  for (const [name, value] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isRecord(value)) throw fail('__metadata__', 'an object of strings', value)
      for (const [key, text] of Object.entries(value)) {
        if (typeof text !== 'string') throw fail(`__metadata__ '${key}'`, 'a string', text)
        metadata[key] = text
      }
      continue
    }
    const label = `tensor '${name}'`
    if (!isRecord(value)) throw fail(label, 'an object with dtype, shape and data_offsets', value)
    const { dtype, shape, data_offsets: offsets } = value
    if (typeof dtype !== 'string' || !Object.hasOwn(dtypeBytes, dtype)) {
      throw fail(`${label} dtype`, `one of ${Object.keys(dtypeBytes).join(' ')}`, dtype)
    }
    if (!Array.isArray(shape) || !shape.every(isCount)) {
      throw fail(`${label} shape`, 'a list of integers from 0', shape)
    }
    if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
      throw fail(`${label} data_offsets`, 'two integers from 0', offsets)
    }
    const [from, to] = offsets as [number, number]
    if (from > to) throw fail(`${label} data_offsets`, 'begin ≤ end', offsets)
    if (to > size - dataStart) {
      throw fail(`${label} data_offsets`, `an end within the ${size - dataStart} bytes of data`, offsets)
    }
    const bytes = (shape as number[]).reduce((n, d) => n * d, dtypeBytes[dtype as SafetensorsDtype])
    if (!Number.isSafeInteger(bytes)) throw fail(`${label} shape`, 'fewer than 2^53 bytes', shape)
    if (bytes !== to - from) {
      throw fail(label, `${bytes} bytes for ${dtype} [${shape.join(', ')}]`, `${to - from} bytes`)
    }
    entries.set(name, {
      dtype: dtype as SafetensorsDtype,
      shape: Object.freeze([...(shape as number[])]),
      begin: dataStart + from,
      end: dataStart + to,
      file: path,
    })
  }
  checkCover(entries, dataStart, size, fail)
  return { entries, metadata }
}

function checkCover(
  entries: Map<string, TensorEntry>,
  dataStart: number,
  size: number,
  fail: (tensor: string, expected: string, received: unknown) => PyraflowError,
): void {
  let reached = dataStart
  for (const [name, entry] of [...entries].sort((a, b) => a[1].begin - b[1].begin || a[1].end - b[1].end)) {
    if (entry.begin !== reached) {
      const kind = entry.begin < reached ? 'an overlap with' : 'a hole after'
      throw fail(
        `tensor '${name}'`,
        `to begin at data byte ${reached - dataStart}`,
        `${entry.begin - dataStart}: ${kind} the tensor before it`,
      )
    }
    reached = entry.end
  }
  if (reached !== size) {
    throw fail('data', `to end with the last tensor at byte ${reached}`, `a file of ${size} bytes`)
  }
}

/** Whether a JSON value is an object and not a list. */
export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0
}

/** The parts of an error about a damaged file. */
export interface Trouble {
  what: string
  expected: string
  received: string
  remedy: string
  cause?: unknown
}

/** An `ERR_CHECKPOINT` that names the file. */
export function damaged(path: string, trouble: Trouble): PyraflowError {
  return new PyraflowError('ERR_CHECKPOINT', { ...trouble, what: `${path}: ${trouble.what}` })
}
