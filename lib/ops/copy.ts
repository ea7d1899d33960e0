import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { record } from '../tensor/tape.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'
import { around, expectShape, expectThat, resolveAxis } from './check.ts'

/** The same values in another shape of as many elements; shares the memory of `x`. One dimension may be −1. */
export function reshape(x: Tensor, shape: readonly number[]): Tensor {
  const open = shape.indexOf(-1)
  const rest = sizeOf(shape.filter((_, i) => i !== open))
  const full = open < 0 ? shape : shape.map((d, i) => (i === open ? x.size / rest : d))
  if (sizeOf(full) !== x.size || full.some((d) => !Number.isInteger(d))) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'reshape',
      expected: `a shape of ${x.size} elements for [${x.shape.join(', ')}]`,
      received: `[${shape.join(', ')}]`,
    })
  }
  const y = x.view(full)
  record([x], [y], ([g]) => [(g as Tensor).view(x.shape)])
  return y
}

// Copies `count` steps of one axis from x (at `from`) to y (at `to`); all other axes agree.
function copyRegion(x: Tensor, from: number, y: Tensor, to: number, axis: number, count: number): void {
  const [outer, xAxis, inner] = around(x.shape, axis)
  if (outer * count * inner === 0) return
  engine.run('copy_region', [x], [y], [outer, count, inner, xAxis, from, y.shape[axis] as number, to, 0])
}

/** Copies x into `to` from step `at` of an axis on; all other axes agree. Not differentiable. @throws ERR_SHAPE */
export function copyInto(x: Tensor, to: Tensor, axis: number, at: number): void {
  const steps = x.shape[axis] as number
  const others = x.shape.map((d, i) => (i === axis ? null : d))
  expectShape('copyInto', `a tensor that agrees but for axis ${axis}`, to, others)
  expectThat(
    at >= 0 && at + steps <= (to.shape[axis] as number),
    'copyInto',
    `room for ${steps} steps from ${at} on`,
    to,
  )
  copyRegion(x, 0, to, at, axis, steps)
}

function cut(x: Tensor, axis: number, start: number, count: number): Tensor {
  const shape = x.shape.map((d, i) => (i === axis ? count : d))
  const [outer, , inner] = around(x.shape, axis)
  // Along the first axis a slice is a piece of the same memory.
  if (outer === 1) return x.view(shape, start * inner)
  const y = Tensor.empty(shape, x.dtype)
  copyRegion(x, start, y, 0, axis, count)
  return y
}

/**
 * `count` steps of one axis from `start` on. Along the first axis the result shares the memory of `x`; along any
 * other it is a copy.
 */
export function slice(x: Tensor, axis: number, start: number, count: number): Tensor {
  const at = resolveAxis('slice', x, axis)
  const size = x.shape[at] as number
  if (!(start >= 0 && count >= 0 && start + count <= size)) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'slice',
      expected: `a part of the ${size} steps of axis ${axis} of [${x.shape.join(', ')}]`,
      received: `${start} to ${start + count}`,
    })
  }
  const y = cut(x, at, start, count)
  record([x], [y], ([g]) => {
    const dx = Tensor.zeros(x.shape, x.dtype)
    copyRegion(g as Tensor, 0, dx, start, at, count)
    return [dx]
  })
  return y
}

// All in one op, as pieces of one memory.
function equalParts(x: Tensor, axis: number, n: number): Tensor[] {
  const shape = x.shape.map((d, i) => (i === axis ? d / n : d))
  const [outer, size, inner] = around(x.shape, axis)
  const each = sizeOf(shape)
  const lines = x.view([outer, n, (size / n) * inner])
  const parts = outer === 1 ? lines : permuted(lines, [1, 0, 2])
  const ys = Array.from({ length: n }, (_, i) => parts.view(shape, i * each))
  for (const t of new Set([lines, parts])) t.dispose()
  return ys
}

/** `n` slices of one axis, of lengths that differ by at most one (longer ones first); equal ones share one memory. */
export function chunk(x: Tensor, axis: number, n: number): Tensor[] {
  const at = resolveAxis('chunk', x, axis)
  const size = x.shape[at] as number
  if (!(Number.isInteger(n) && n >= 1 && n <= size)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'chunk: n',
      expected: `a whole number from 1 to ${size}`,
      received: String(n),
    })
  }
  const starts = Array.from({ length: n + 1 }, (_, i) => i * Math.floor(size / n) + Math.min(i, size % n))
  const length = (i: number) => (starts[i + 1] as number) - (starts[i] as number)
  const ys =
    size % n === 0
      ? equalParts(x, at, n)
      : Array.from({ length: n }, (_, i) => cut(x, at, starts[i] as number, length(i)))
  // One node for all pieces, so that their gradients meet in one buffer.
  record([x], ys, (grads) => {
    const dx = grads.every((g) => g !== null)
      ? Tensor.empty(x.shape, x.dtype)
      : Tensor.zeros(x.shape, x.dtype)
    grads.forEach((g, i) => {
      if (g) copyRegion(g, 0, dx, starts[i] as number, at, length(i))
    })
    return [dx]
  })
  return ys
}

/** The tensors one after the other along an axis; all other axes agree. The result has the first one's dtype. */
export function concat(xs: readonly Tensor[], axis: number): Tensor {
  const first = xs[0]
  if (!first)
    throw new PyraflowError('ERR_OPTION', {
      what: 'concat',
      expected: 'one tensor or more',
      received: 'none',
    })
  const at = resolveAxis('concat', first, axis)
  const others = first.shape.map((d, i) => (i === at ? null : d))
  for (const x of xs) expectShape('concat', `tensors that agree but for axis ${at}`, x, others)
  const length = xs.reduce((n, x) => n + (x.shape[at] as number), 0)
  const y = Tensor.empty(
    first.shape.map((d, i) => (i === at ? length : d)),
    first.dtype,
  )
  const starts: number[] = []
  let start = 0
  for (const x of xs) {
    copyRegion(x, 0, y, start, at, x.shape[at] as number)
    starts.push(start)
    start += x.shape[at] as number
  }
  record(xs, [y], ([grad]) => {
    const g = grad as Tensor
    return xs.map((x, i) => {
      if (x.dtype === g.dtype) return cut(g, at, starts[i] as number, x.shape[at] as number)
      const dx = Tensor.empty(x.shape, x.dtype)
      copyRegion(g, starts[i] as number, dx, 0, at, x.shape[at] as number)
      return dx
    })
  })
  return y
}

function permuted(x: Tensor, order: readonly number[]): Tensor {
  const y = Tensor.empty(
    order.map((p) => x.shape[p] as number),
    x.dtype,
  )
  engine.run('permute', [x], [y], [...order, 0, 0, 0, 0, 0, 0].slice(0, 6))
  return y
}

/** Axis j of the result is axis `order[j]` of `x`. */
export function permute(x: Tensor, order: readonly number[]): Tensor {
  const valid = order.length === x.rank && x.shape.every((_, i) => order.includes(i))
  expectThat(
    valid,
    'permute',
    `a tensor of as many axes as the order (${order.join(', ')}), each named once`,
    x,
  )
  const y = permuted(x, order)
  record([x], [y], ([g]) => [
    permuted(
      g as Tensor,
      x.shape.map((_, i) => order.indexOf(i)),
    ),
  ])
  return y
}
