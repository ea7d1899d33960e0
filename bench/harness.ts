import { DTYPES, type DType, engine } from '../lib/engine/engine.ts'
import { PyraflowError } from '../lib/engine/errors.ts'
import { native } from '../lib/engine/native.ts'
import type { Tensor } from '../lib/tensor/tensor.ts'

/** A bound that a figure of this project must hold (docs/benchmarks.md says where it comes from). */
export interface Required {
  /** Which figure of the row is bound. */
  of: 'value' | 'ratio'
  atLeast?: number
  atMost?: number
}

/** One measured figure. Ratios compare two rates of one run and are what may be compared between machines. */
export interface Row {
  group: string
  name: string
  value: number
  unit: string
  /** This rate over the rate of `against`. */
  ratio?: number
  against?: string
  /** This part of the whole that the group measured, 0 to 1. */
  share?: number
  required?: Required
}

/** How long a measurement may take: `--quick` only shows that everything runs. */
export interface Effort {
  quick: boolean
  /** Seconds of one slice of a measurement. */
  seconds: number
  /** Slices per side; the median counts. */
  rounds: number
}

/** A row as a group gives it. */
export type Unnamed = Omit<Row, 'group'>

export type Group = (effort: Effort) => Promise<Unnamed[]>

export function effortOf(quick: boolean): Effort {
  return quick ? { quick, seconds: 0.005, rounds: 3 } : { quick, seconds: 0.2, rounds: 9 }
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  if (sorted.length === 0) return Number.NaN
  return sorted.length % 2
    ? (sorted[middle] as number)
    : ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2
}

type Ceiling = 'matmul' | 'copy' | 'multiply-add' | 'clock' | 'onednn'

/** Queues a measurement of what the machine does without pyraflow; it runs on the engine thread in its turn. */
export async function ceiling(kind: Ceiling, ...job: number[]): Promise<number> {
  void engine.device
  const addon = native()
  if (!addon.benchCeiling) {
    throw new PyraflowError('ERR_DEVICE', {
      what: 'The native addon is older than the benchmarks',
      remedy: 'Rebuild it with `npm run build:native`.',
    })
  }
  const numbers = new Float64Array(5)
  numbers.set(job)
  await addon.benchCeiling(kind, numbers)
  return numbers[0] as number
}

/** Whether the engine computes on a GPU: then its ceilings are those of the device. */
export const onGpu = (): boolean => engine.device.backend.startsWith('cuda')

/** Whether the device multiplies pairs of bf16: else it is only a storage type, and has no bounds. */
export const fastBf16 = (): boolean => /bf16|amx|cuda/.test(engine.device.backend)

/** Whose matrix products are the ceiling. */
export const productLibrary = (): string => (onGpu() ? 'cuBLASLt' : 'oneDNN')

/** What oneDNN multiplies bf16 in: f32 on a CPU for which it has no bf16 product. */
export async function productDtype(dtype: DType): Promise<DType> {
  return (await ceiling('matmul', 64, 64, 64, DTYPES[dtype].code, 0)) > 0 ? dtype : 'f32'
}

// Not a type of tensors: `PF_I8` of native/core/op.h.
const PF_I8 = 7

/** Whether the device multiplies eight bits. */
export const hasInt8 = (): boolean => engine.packBytes(64, 64, 'bf16', 'int8') > 0

/** GFLOP/s of oneDNN or cuBLASLt alone: one primitive for x[m, k]·w[n, k]ᵀ, weights in the layout it likes best. */
export function bareMatmul(
  m: number,
  n: number,
  k: number,
  dtype: DType | 'int8',
  seconds: number,
): Promise<number> {
  return ceiling('matmul', m, n, k, dtype === 'int8' ? PF_I8 : DTYPES[dtype].code, seconds)
}

/** GFLOP/s of the widest multiply-adds this CPU has, out of registers; undefined where it has none for the dtype. */
export async function bareMultiplyAdd(dtype: DType, seconds: number): Promise<number | undefined> {
  const rate = await ceiling('multiply-add', DTYPES[dtype].code, seconds)
  return rate > 0 ? rate : undefined
}

/** GB/s, read plus written, of a memcpy that moves `moved` bytes in all. */
export function bareCopy(moved: number, seconds: number): Promise<number> {
  return ceiling('copy', moved / 2, seconds)
}

/**
 * Mean seconds of one `op`, of `count` queued together, by the engine thread's own clock: it includes everything the
 * engine does for them (dispatch, allocation, the kernels) and no JavaScript. The first run is not counted.
 */
export async function engineSeconds(op: () => Tensor, count: number): Promise<number> {
  op().dispose()
  const begin = ceiling('clock')
  for (let i = 0; i < count; i++) op().dispose()
  const end = ceiling('clock')
  const [from, to] = await Promise.all([begin, end])
  return (to - from) / count
}

/** How many runs of `op` fill `seconds`. */
export async function countFor(op: () => Tensor, seconds: number): Promise<number> {
  await engineSeconds(op, 1)
  const each = await engineSeconds(op, 2)
  return Math.min(20_000, Math.max(1, Math.round(seconds / Math.max(each, 1e-7))))
}

/** Medians of both sides and of the ratio of each pair of neighbouring slices. */
export interface Comparison {
  ours: number
  theirs: number
  ratio: number
}

/**
 * ABAB: slices of both sides by turns, so that whatever else the machine does meets both. `ours` is queued while
 * `theirs` still runs: then queueing, which is measured elsewhere, does not slow the engine down on few cores.
 */
export async function interleave(
  effort: Effort,
  ours: () => Promise<number>,
  theirs: () => Promise<number>,
): Promise<Comparison> {
  const a: number[] = []
  const b: number[] = []
  for (let i = 0; i < effort.rounds; i++) {
    const [their, our] = await Promise.all([theirs(), ours()])
    a.push(our)
    b.push(their)
  }
  // Without a peer there is no ratio, and no bound on it is met.
  const ratios = a.map((x, i) => x / (b[i] as number))
  return { ours: median(a), theirs: median(b), ratio: b.every((x) => x > 0) ? median(ratios) : Number.NaN }
}

/** Kernel time per op since `engine.profile(true)`, most first, for one of `runs`; the small rest is one row. */
export function breakdown(prefix: string, runs = 1, most = 10): Unnamed[] {
  const ops = engine.profileRead()
  const sum = (list: typeof ops): number => list.reduce((n, { seconds }) => n + seconds, 0)
  const row = (name: string, seconds: number): Unnamed => ({
    name: `${prefix}: ${name}`,
    value: (1000 * seconds) / runs,
    unit: 'ms',
    share: seconds / sum(ops),
  })
  const rest = ops.slice(most)
  return [
    ...ops.slice(0, most).map(({ op, calls, seconds }) => row(`${op} ×${calls / runs}`, seconds)),
    ...(rest.length > 0 ? [row(`${rest.length} more`, sum(rest))] : []),
  ]
}

export function meets({ value, ratio, required }: Row): boolean {
  const figure = required?.of === 'ratio' ? ratio : value
  if (!required || figure === undefined) return true
  return figure >= (required.atLeast ?? -Infinity) && figure <= (required.atMost ?? Infinity)
}
