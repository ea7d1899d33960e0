import { engine, type Operand } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { gradBuffer } from '../tensor/tape.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'
import { cast } from './cast.ts'

/**
 * Throws ERR_SHAPE unless `t` has these dimensions; null stands for any. `name` names the dimensions for the
 * message, e.g. `k [B, L, H, D]`.
 */
export function expectShape(op: string, name: string, t: Tensor, dims: readonly (number | null)[]): void {
  let fits = t.shape.length === dims.length
  for (let i = 0; fits && i < dims.length; i++) fits = dims[i] === null || dims[i] === t.shape[i]
  if (fits) return
  throw new PyraflowError('ERR_SHAPE', {
    what: op,
    expected: `${name} of [${dims.map((d) => d ?? 'any').join(', ')}]`,
    received: `[${t.shape.join(', ')}]`,
  })
}

/** Throws ERR_SHAPE with `expected` unless `condition`. */
export function expectThat(condition: boolean, op: string, expected: string, t: Tensor): void {
  if (condition) return
  throw new PyraflowError('ERR_SHAPE', { what: op, expected, received: `[${t.shape.join(', ')}]` })
}

/** Throws ERR_DTYPE unless every tensor given is f32 or bf16. */
export function expectFloats(op: string, ...tensors: readonly (Tensor | null | undefined)[]): void {
  for (const t of tensors) {
    if (t && t.dtype !== 'f32' && t.dtype !== 'bf16') {
      throw new PyraflowError('ERR_DTYPE', { what: op, expected: 'f32 or bf16', received: t.dtype })
    }
  }
}

/** Throws ERR_DTYPE unless `t` has this dtype. */
export function expectDType(op: string, name: string, t: Tensor, dtype: Tensor['dtype']): void {
  if (t.dtype === dtype) return
  throw new PyraflowError('ERR_DTYPE', { what: `${op}: ${name}`, expected: dtype, received: t.dtype })
}

/** The same memory under another shape for one command, without the cost of a view. */
export function shaped(t: Tensor, shape: readonly number[]): Operand {
  return { storage: t.storage, byteOffset: t.byteOffset, dtype: t.dtype, shape }
}

/** `axis` counted from the end when negative. @throws ERR_OPTION when there is no such axis. */
export function resolveAxis(op: string, t: Tensor, axis: number): number {
  const at = axis < 0 ? axis + t.rank : axis
  if (Number.isInteger(at) && at >= 0 && at < t.rank) return at
  throw new PyraflowError('ERR_OPTION', {
    what: `${op}: axis`,
    expected: `a whole number from ${-t.rank} to ${t.rank - 1}`,
    received: String(axis),
  })
}

/** The shape as [product before the axis, the axis, product after it]. */
export function around(shape: readonly number[], axis: number): [number, number, number] {
  return [sizeOf(shape.slice(0, axis)), shape[axis] as number, sizeOf(shape.slice(axis + 1))]
}

/** The last axes kept, everything before them folded into one: [..., h, w] as [F, h, w] for `last` = 2. */
export function folded(t: Tensor, last: number): Operand {
  const at = t.rank - last
  return shaped(t, [sizeOf(t.shape.slice(0, at)), ...t.shape.slice(at)])
}

/** Where a kernel leaves the f32 gradient of a weight. */
export interface WeightGrad {
  readonly buffer: Tensor
  /** 1 when the kernel adds to what is there, 0 when it overwrites. */
  readonly accumulate: 0 | 1
  /** What the op's backward then returns for this input. */
  readonly result: () => Tensor | null
}

/** A leaf's gradient is added to in place; any other weight gets a fresh buffer, returned in its own dtype. */
export function weightGrad(t: Tensor): WeightGrad {
  const own = gradBuffer(t)
  if (own) return { buffer: own, accumulate: 1, result: () => null }
  const buffer = Tensor.empty(t.shape, 'f32')
  return { buffer, accumulate: 0, result: () => cast(buffer, t.dtype) }
}

/** The one accumulate flag of a kernel that writes two gradients; a fresh buffer beside a leaf's starts from zero. */
export function sharedFlag(a: WeightGrad | null, b: WeightGrad | null): 0 | 1 {
  const both = [a, b].filter((to) => to !== null)
  if (!both.some((to) => to.accumulate)) return 0
  for (const to of both) if (!to.accumulate) engine.run('fill', [], [to.buffer], [0])
  return 1
}
