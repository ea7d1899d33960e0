import { engine } from '../engine/engine.ts'
import { record } from '../tensor/tape.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'
import { around, expectFloats, resolveAxis, shaped } from './check.ts'

/** Whether `from`, right-aligned, stretches to `to` by repeating axes of length 1. */
export function broadcasts(from: readonly number[], to: readonly number[]): boolean {
  const lead = to.length - from.length
  return lead >= 0 && from.every((d, i) => d === 1 || d === to[lead + i])
}

/**
 * Factor times the sum of `g` over the axes along which `like` was broadcast: the gradient of a broadcast operand,
 * of like's shape and dtype.
 */
export function reduceTo(g: Tensor, like: Tensor, factor = 1): Tensor {
  const lead = g.rank - like.rank
  const kept = g.shape.map((d, i) => i >= lead && like.shape[i - lead] === d)
  // Axes of length 1 belong to either side; counting them as kept saves a pass.
  g.shape.forEach((d, i) => {
    if (d === 1) kept[i] = true
  })
  let last = kept.lastIndexOf(false)
  if (last < 0) {
    if (factor === 1 && g.dtype === like.dtype) return g.rank === like.rank ? g : g.view(like.shape)
    const copy = Tensor.empty(like.shape, like.dtype)
    engine.run('axpby', [shaped(g, like.shape), null], [copy], [factor, 0, 0])
    return copy
  }
  let current = g
  let shape = [...g.shape]
  while (last >= 0) {
    // One pass sums a run of neighbouring axes; the partial sums stay f32.
    let first = last
    while (first > 0 && !kept[first - 1]) first--
    const outer = sizeOf(shape.slice(0, first))
    const inner = sizeOf(shape.slice(last + 1))
    const count = sizeOf(shape.slice(first, last + 1))
    shape = shape.map((d, i) => (i >= first && i <= last ? 1 : d))
    const next = first === 0 ? -1 : kept.lastIndexOf(false, first - 1)
    const out = next < 0 ? Tensor.empty(like.shape, like.dtype) : Tensor.empty(shape, 'f32')
    engine.run(
      'sum',
      [shaped(current, [outer, count, inner])],
      [shaped(out, [outer, inner])],
      [outer, count, inner, next < 0 ? factor : 1, 0],
    )
    current = out
    last = next
  }
  return current
}

function total(op: string, x: Tensor, axis: number | undefined, mean: boolean): Tensor {
  expectFloats(op, x)
  const at = axis === undefined ? 0 : resolveAxis(op, x, axis)
  const [outer, count, inner] = axis === undefined ? [1, x.size, 1] : around(x.shape, at)
  const rest = axis === undefined ? [] : x.shape.filter((_, i) => i !== at)
  const y = Tensor.empty(rest.length ? rest : [1], x.dtype)
  const factor = mean ? 1 / count : 1
  engine.run(
    'sum',
    [shaped(x, [outer, count, inner])],
    [shaped(y, [outer, inner])],
    [outer, count, inner, factor, 0],
  )
  record([x], [y], ([g]) => {
    const ones = Tensor.full(x.shape, factor, 'f32')
    const dx = Tensor.empty(x.shape, x.dtype)
    const full = [outer, count, inner]
    engine.run(
      'binary',
      [shaped(ones, full), shaped(g as Tensor, [outer, 1, inner])],
      [shaped(dx, full)],
      [2],
    )
    return [dx]
  })
  return y
}

/** Sum over all elements as [1], or over one axis, which is removed (the last one left stays as [1]). Accumulates in f32. */
export function sum(x: Tensor, axis?: number): Tensor {
  return total('sum', x, axis, false)
}

/** Mean over all elements or over one axis, as {@link sum}. */
export function mean(x: Tensor, axis?: number): Tensor {
  return total('mean', x, axis, true)
}
