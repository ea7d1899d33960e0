import { type DType, engine, PACK_FORMS, type PackForm } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { keep } from '../tensor/scope.ts'
import { needsGrad, noGrad, record } from '../tensor/tape.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectShape, expectThat, shaped, weightGrad } from './check.ts'
import { copyInto, permute } from './copy.ts'
import { add, geluTanh, silu } from './pointwise.ts'
import { reduceTo } from './reduce.ts'

export type Activation = 'none' | 'geluTanh' | 'silu'

const ACTIVATION: Record<Activation, number> = { none: 0, geluTanh: 1, silu: 2 }

/** Options of {@link linear}. */
export interface LinearOptions {
  /** Applied to x·Wᵀ + b. */
  readonly activation?: Activation | undefined
  /** Added last, [..., N]. */
  readonly residual?: Tensor | null | undefined
  /**
   * Where the result goes instead of a new tensor, [rows, W] in x's dtype: columns `column` to `column` + N of its rows.
   * Not where a gradient is wanted.
   */
  readonly into?: Tensor | undefined
  /** Default 0. */
  readonly column?: number | undefined
}

function checkPair(op: string, a: Tensor, b: Tensor, name: string): void {
  if (a.dtype === b.dtype) return
  throw new PyraflowError('ERR_DTYPE', {
    what: op,
    expected: `${name} of ${a.dtype}, as the other operand`,
    received: b.dtype,
    remedy: 'Cast one of them.',
  })
}

/**
 * act(x·Wᵀ + b) + residual, in x's dtype with f32 accumulation.
 *
 * @param x - [..., K]
 * @param weight - [N, K], of x's dtype unless packed; its packed form is used where no gradient is wanted
 * @param bias - [N]
 * @returns [..., N], or `into`
 * @throws ERR_OPTION for an activation that there is none of, and for `into` beside gradients; ERR_SHAPE; ERR_DTYPE
 */
export function linear(
  x: Tensor,
  weight: Tensor,
  bias: Tensor | null = null,
  options: LinearOptions = {},
): Tensor {
  const activation = options.activation ?? 'none'
  const residual = options.residual ?? null
  if (!Object.hasOwn(ACTIVATION, activation)) {
    const expected = `activation one of ${Object.keys(ACTIVATION).join(', ')}`
    throw new PyraflowError('ERR_OPTION', { what: 'linear', expected, received: String(activation) })
  }
  expectFloats('linear', x, weight, bias, residual)
  const k = x.shape[x.rank - 1] ?? 0
  expectShape('linear', 'weight [N, K]', weight, [null, k])
  // A packed weight was packed in the type computed in, whatever the file holds.
  if (!weight.packed) checkPair('linear', x, weight, 'weight')
  const n = weight.shape[0] as number
  if (bias) expectShape('linear', 'bias [N]', bias, [n])
  const shape = [...x.shape.slice(0, -1), n]
  if (residual) expectShape('linear', 'residual [..., N]', residual, shape)

  const { into, column = 0 } = options
  if (into) return linearInto(into, column, x, weight, bias, options)

  const wanted = needsGrad(x) || needsGrad(weight) || needsGrad(bias)
  if (wanted && activation !== 'none') {
    // The gradient needs the value before the activation, which the fused kernel does not keep.
    const inner = linear(x, weight, bias)
    const y = activation === 'silu' ? silu(inner) : geluTanh(inner)
    return residual ? add(y, residual) : y
  }
  const m = sizeOf(x.shape.slice(0, -1))
  const y = Tensor.empty(shape, x.dtype)
  const rows = shaped(x, [m, k])
  const added = residual && shaped(residual, [m, n])
  const out = shaped(y, [m, n])
  if (!wanted && weight.packed) {
    engine.run('matmul_packed', [rows, weight.packed, bias, added], [out], [n, ACTIVATION[activation], 0])
  } else {
    engine.run('matmul', [rows, weight, bias, added], [out], [0, 1, ACTIVATION[activation], 0])
  }
  if (!wanted && !needsGrad(residual)) return y

  const forX = needsGrad(x)
  const forWeight = needsGrad(weight)
  const forBias = bias !== null && needsGrad(bias)
  const forResidual = needsGrad(residual)
  record([x, weight, bias, residual], [y], ([grad]) => {
    const g = grad as Tensor
    const gRows = shaped(g, [m, n])
    let dx: Tensor | null = null
    let dWeight: Tensor | null = null
    let dBias: Tensor | null = null
    if (forX) {
      dx = Tensor.empty(x.shape, x.dtype)
      engine.run('matmul', [gRows, weight, null, null], [shaped(dx, [m, k])], [0, 0, 0, 0])
    }
    if (forWeight) {
      const to = weightGrad(weight)
      engine.run('matmul', [gRows, rows, null, null], [to.buffer], [1, 0, 0, to.accumulate])
      dWeight = to.result()
    }
    if (forBias) {
      const to = weightGrad(bias as Tensor)
      engine.run('sum', [shaped(g, [1, m, n])], [shaped(to.buffer, [1, n])], [1, m, n, 1, to.accumulate])
      dBias = to.result()
    }
    return [dx, dWeight, dBias, forResidual ? g : null]
  })
  return y
}

// The kernels of packed weights write rows as long as those of their result; others get a copy.
function linearInto(
  into: Tensor,
  column: number,
  x: Tensor,
  weight: Tensor,
  bias: Tensor | null,
  options: LinearOptions,
): Tensor {
  const { activation = 'none', residual = null } = options
  const [n, k] = weight.shape as [number, number]
  const rows = x.size / k
  const width = into.shape[1] ?? 0
  expectShape('linear', 'into [rows, W]', into, [rows, null])
  expectThat(column >= 0 && column + n <= width, 'linear', `${n} columns of into from ${column} on`, into)
  checkPair('linear', x, into, 'into')
  if ([x, weight, bias, residual].some(needsGrad)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'linear',
      expected: 'no `into` where a gradient is wanted',
      received: `into [${into.shape}]`,
    })
  }
  if (weight.packed && !residual && rows > 0) {
    const scalars = [n, ACTIVATION[activation], column]
    engine.run('matmul_packed', [shaped(x, [rows, k]), weight.packed, bias, null], [into], scalars)
  } else {
    const y = linear(x, weight, bias, { activation, residual })
    copyInto(y.view([rows, n]), into, 1, column)
    y.dispose()
  }
  return into
}

/** Which operands of {@link matmul} are stored with their last two axes exchanged. */
export interface MatmulOptions {
  readonly transA?: boolean | undefined
  readonly transB?: boolean | undefined
}

function product(a: Tensor, b: Tensor, transA: boolean, transB: boolean, dtype = a.dtype): Tensor {
  const m = a.shape[a.rank - (transA ? 1 : 2)] as number
  const n = b.shape[b.rank - (transB ? 2 : 1)] as number
  const y = Tensor.empty([...a.shape.slice(0, -2), m, n], dtype)
  engine.run('matmul', [a, b, null, null], [y], [transA ? 1 : 0, transB ? 1 : 0, 0, 0])
  return y
}

/**
 * a·b over the last two axes, in a's dtype with f32 accumulation.
 *
 * @param a - [..., M, K], or [..., K, M] with `transA`
 * @param b - [..., K, N], or [..., N, K] with `transB`; the same leading axes as a, or none
 * @returns [..., M, N]
 */
export function matmul(a: Tensor, b: Tensor, options: MatmulOptions = {}): Tensor {
  const transA = options.transA ?? false
  const transB = options.transB ?? false
  expectFloats('matmul', a, b)
  checkPair('matmul', a, b, 'b')
  expectThat(a.rank >= 2, 'matmul', 'a [..., M, K]', a)
  const k = a.shape[a.rank - (transA ? 2 : 1)] as number
  const lead = b.rank === 2 ? [] : a.shape.slice(0, -2)
  const name = transB ? 'b [..., N, K]' : 'b [..., K, N]'
  expectShape('matmul', name, b, [...lead, ...(transB ? [null, k] : [k, null])])
  const y = product(a, b, transA, transB)
  if (!needsGrad(a) && !needsGrad(b)) return y

  const forA = needsGrad(a)
  const forB = needsGrad(b)
  record([a, b], [y], ([grad]) => {
    const g = grad as Tensor
    const shared = b.rank === 2 && a.rank > 2
    let da: Tensor | null = null
    let db: Tensor | null = null
    // With A and B the matrices after transposition: dA = G·Bᵀ and dB = Aᵀ·G.
    if (forA && !transA) da = product(g, b, false, !transB)
    else if (forA && !shared) da = product(b, g, transB, true)
    else if (forA) {
      const order = a.shape.map((_, i) => i)
      order.splice(-2, 2, a.rank - 1, a.rank - 2)
      da = noGrad(() => permute(product(g, b, false, !transB), order))
    }
    if (forB) {
      const each = transB ? product(g, a, true, transA, 'f32') : product(a, g, !transA, false, 'f32')
      db = reduceTo(each, b)
    }
    return [da, db]
  })
  return y
}

/**
 * Bytes of a packed weight [n, k], 0 where the backend packs none.
 *
 * @throws ERR_DEVICE for eight bits where the device has no exact products of them
 */
export function packedBytes(n: number, k: number, dtype: DType, form: PackForm): number {
  const bytes = engine.packBytes(n, k, dtype, form)
  if (bytes > 0 || form === 'plain') return bytes
  throw new PyraflowError('ERR_DEVICE', {
    what: 'weights in int8',
    expected: 'a CPU with dot products of eight bits (AVX-512 VNNI, AMX)',
    received: engine.device.backend,
    remedy: 'Leave quantize out.',
  })
}

/** Queues the packing of `w` [N, K] into `packed`, u8 of {@link packedBytes}. */
export function packInto(packed: Tensor, w: Tensor, form: PackForm): void {
  engine.run('matmul_pack', [w], [packed], [PACK_FORMS[form]])
}

/**
 * Stores the backend's packed form of a weight [N, K] in `w.packed`, for {@link linear} without gradients; as `int8` it is
 * rounded to eight bits, and so is what it will be multiplied with (docs/decisions.md, 33). Does nothing where the backend
 * has no packed form. The form does not follow later changes of the weight.
 *
 * @throws ERR_DEVICE as {@link packedBytes}
 */
export function packWeight(w: Tensor, form: PackForm = 'plain'): void {
  expectShape('packWeight', 'w [N, K]', w, [null, null])
  const [n, k] = w.shape as [number, number]
  const bytes = packedBytes(n, k, w.dtype, form)
  if (bytes === 0 || w.packed) return
  const packed = keep(Tensor.empty([bytes], 'u8'))
  packInto(packed, w, form)
  w.packed = packed
}
