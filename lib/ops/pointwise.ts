import { engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { cast } from './cast.ts'
import { expectDType, expectFloats, expectShape, expectThat } from './check.ts'
import { broadcasts, reduceTo } from './reduce.ts'

// Numbers of native/ops/pointwise/pointwise.h.
const UNARY = {
  silu: 0,
  geluTanh: 1,
  exp: 2,
  clamp: 3,
  square: 4,
  sqrt: 5,
  sigmoid: 6,
  tanh: 7,
  quickGelu: 8,
  relu: 9,
} as const
const BINARY = { add: 0, sub: 1, mul: 2, div: 3 } as const

function unary(name: keyof typeof UNARY, x: Tensor, a = 0, b = 0): Tensor {
  expectFloats(name, x)
  const scalars = [UNARY[name], a, b]
  const y = Tensor.empty(x.shape, x.dtype)
  engine.run('unary', [x], [y], scalars)
  record([x], [y], ([g]) => {
    const dx = Tensor.empty(x.shape, x.dtype)
    engine.run('unary_backward', [x, g as Tensor], [dx], scalars)
    return [dx]
  })
  return y
}

/** x·sigmoid(x). */
export function silu(x: Tensor): Tensor {
  return unary('silu', x)
}

/** ½x(1 + tanh(√(2/π)(x + 0.044715x³))). */
export function geluTanh(x: Tensor): Tensor {
  return unary('geluTanh', x)
}

export function exp(x: Tensor): Tensor {
  return unary('exp', x)
}

/** min(max(x, lo), hi); outside the interval the gradient is zero. */
export function clamp(x: Tensor, lo: number, hi: number): Tensor {
  return unary('clamp', x, lo, hi)
}

export function square(x: Tensor): Tensor {
  return unary('square', x)
}

export function sqrt(x: Tensor): Tensor {
  return unary('sqrt', x)
}

export function sigmoid(x: Tensor): Tensor {
  return unary('sigmoid', x)
}

export function tanh(x: Tensor): Tensor {
  return unary('tanh', x)
}

/** x·sigmoid(1.702x). */
export function quickGelu(x: Tensor): Tensor {
  return unary('quickGelu', x)
}

export function relu(x: Tensor): Tensor {
  return unary('relu', x)
}

// erfc(z) ≈ t·(c₁ + t·(c₂ + …))·exp(−z²) with t = 1/(1 + p·z), for z ≥ 0 to 1.5e-7 (Abramowitz and Stegun 7.1.26).
const ERFC_P = 0.3275911
const ERFC_C = [0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429] as const

/** x·Φ(x) with Φ the normal distribution function, to 1e-6: the GELU that is not approximated by tanh. */
export function gelu(x: Tensor): Tensor {
  const wide = cast(x, 'f32')
  const positive = relu(wide)
  const size = axpby(positive, wide, 2, -1)
  const t = div(Tensor.full(x.shape, 1), scale(size, ERFC_P * Math.SQRT1_2, 1))
  const series = ERFC_C.toReversed()
  let y = scale(t, series[0] as number, series[1])
  for (const c of series.slice(2)) y = scale(mul(y, t), 1, c)
  // x·Φ(x) = max(x, 0) − ½|x|·erfc(|x|/√2).
  const tail = mul(mul(mul(y, t), exp(scale(square(wide), -0.5))), size)
  return cast(axpby(positive, tail, 1, -0.5), x.dtype)
}

function apply(kind: keyof typeof BINARY, a: Tensor, b: Tensor, dtype = a.dtype): Tensor {
  const y = Tensor.empty(a.shape, dtype)
  engine.run('binary', [a, b], [y], [BINARY[kind]])
  return y
}

function binary(kind: keyof typeof BINARY, a: Tensor, b: Tensor): Tensor {
  expectFloats(kind, a, b)
  expectThat(broadcasts(b.shape, a.shape), kind, `b that broadcasts to a [${a.shape.join(', ')}]`, b)
  const y = apply(kind, a, b)
  if (!needsGrad(a) && !needsGrad(b)) return y
  const forA = needsGrad(a)
  const forB = needsGrad(b)
  record([a, b], [y], ([grad]) => {
    const g = grad as Tensor
    let da: Tensor | null = null
    let db: Tensor | null = null
    if (forA) {
      da = kind === 'mul' || kind === 'div' ? apply(kind, g, b, a.dtype) : g
    }
    if (forB) {
      // d(a/b)/db = −(a/b)/b. Products are kept in f32, because they are summed next.
      if (kind === 'mul') db = reduceTo(apply('mul', g, a, 'f32'), b)
      else if (kind === 'div') db = reduceTo(apply('div', apply('mul', g, y, 'f32'), b), b, -1)
      else db = reduceTo(g, b, kind === 'sub' ? -1 : 1)
    }
    return [da, db]
  })
  return y
}

/** a + b; b broadcasts to a's shape, right-aligned. The result has a's dtype, and so in the three below. */
export function add(a: Tensor, b: Tensor): Tensor {
  return binary('add', a, b)
}

/** a − b, as {@link add}. */
export function sub(a: Tensor, b: Tensor): Tensor {
  return binary('sub', a, b)
}

/** a·b elementwise, as {@link add}. */
export function mul(a: Tensor, b: Tensor): Tensor {
  return binary('mul', a, b)
}

/** a/b, as {@link add}. */
export function div(a: Tensor, b: Tensor): Tensor {
  return binary('div', a, b)
}

function scaled(x: Tensor, alpha: number, offset: number, dtype = x.dtype): Tensor {
  const y = Tensor.empty(x.shape, dtype)
  engine.run('axpby', [x, null], [y], [alpha, 0, offset])
  return y
}

/** alpha·x + offset. */
export function scale(x: Tensor, alpha: number, offset = 0): Tensor {
  expectFloats('scale', x)
  const y = scaled(x, alpha, offset)
  record([x], [y], ([g]) => [scaled(g as Tensor, alpha, 0)])
  return y
}

/** alpha·a + beta·b, of one shape; the result has a's dtype. */
export function axpby(a: Tensor, b: Tensor, alpha: number, beta: number): Tensor {
  expectFloats('axpby', a, b)
  expectShape('axpby', 'b as a', b, a.shape)
  const y = Tensor.empty(a.shape, a.dtype)
  engine.run('axpby', [a, b], [y], [alpha, beta, 0])
  if (!needsGrad(a) && !needsGrad(b)) return y
  const forA = needsGrad(a)
  const forB = needsGrad(b)
  record([a, b], [y], ([g]) => [
    forA ? scaled(g as Tensor, alpha, 0, a.dtype) : null,
    forB ? scaled(g as Tensor, beta, 0, b.dtype) : null,
  ])
  return y
}

/**
 * out[n] = x[n] + gate[rows[n]]·y[n]: a residual branch weighed by its conditioning row.
 *
 * @param x - [N, d]
 * @param y - [N, d]
 * @param gate - [R, d]
 * @param rows - i32 [N], each below R
 */
export function gatedAdd(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor): Tensor {
  expectFloats('gatedAdd', x, y, gate)
  expectShape('gatedAdd', 'x [N, d]', x, [null, null])
  expectShape('gatedAdd', 'y [N, d]', y, x.shape)
  expectShape('gatedAdd', 'gate [R, d]', gate, [null, x.shape[1] as number])
  expectShape('gatedAdd', 'rows [N]', rows, [x.shape[0] as number])
  expectDType('gatedAdd', 'rows', rows, 'i32')
  const out = Tensor.empty(x.shape, x.dtype)
  engine.run('gated_add', [x, y, gate, rows], [out], [])
  if (!needsGrad(x) && !needsGrad(y) && !needsGrad(gate)) return out
  const forX = needsGrad(x)
  const forY = needsGrad(y)
  const forGate = needsGrad(gate)
  record([x, y, gate], [out], ([grad]) => {
    const g = grad as Tensor
    const dy = forY ? Tensor.empty(y.shape, y.dtype) : null
    const dgate = forGate ? Tensor.empty(gate.shape, gate.dtype) : null
    if (dy || dgate) engine.run('gated_add_backward', [g, y, gate, rows], [dy, dgate], [])
    return [forX ? g : null, dy, dgate]
  })
  return out
}
