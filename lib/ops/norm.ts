import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'
import { expectDType, expectFloats, expectShape, weightGrad } from './check.ts'

/** Options of {@link normModulate}. */
export interface NormModulateOptions {
  /** [R, d] */
  readonly shift?: Tensor | null | undefined
  /** [R, d] */
  readonly scale?: Tensor | null | undefined
  /** i32 [N], each below R; may be left out when R is 1. */
  readonly rows?: Tensor | null | undefined
  /** Default 1e-6. */
  readonly eps?: number | undefined
}

/**
 * LN(x)·(1 + scale[rows[n]]) + shift[rows[n]] with LN the normalisation of the last axis to mean 0 and variance 1
 * (no weights of its own).
 *
 * @param x - [..., d]; N is the product of the other axes
 */
export function normModulate(x: Tensor, options: NormModulateOptions = {}): Tensor {
  const shift = options.shift ?? null
  const scale = options.scale ?? null
  const rows = options.rows ?? null
  const op = 'normModulate'
  expectFloats(op, x, shift, scale)
  const d = x.shape[x.rank - 1] ?? 0
  const n = sizeOf(x.shape.slice(0, -1))
  const table = scale ?? shift
  if (scale) expectShape(op, 'scale [R, d]', scale, [null, d])
  if (shift) expectShape(op, 'shift [R, d]', shift, [scale ? (scale.shape[0] as number) : null, d])
  if (rows) {
    expectShape(op, 'rows [N]', rows, [n])
    expectDType(op, 'rows', rows, 'i32')
  } else if (table && table.shape[0] !== 1) {
    throw new PyraflowError('ERR_OPTION', {
      what: `${op}: rows`,
      expected: `i32 [${n}] for ${table.shape[0]} entries of shift and scale`,
      received: 'none',
    })
  }
  const wanted = needsGrad(x) || needsGrad(shift) || needsGrad(scale)
  const y = Tensor.empty(x.shape, x.dtype)
  const mean = wanted ? Tensor.empty([n], 'f32') : null
  const rstd = wanted ? Tensor.empty([n], 'f32') : null
  engine.run('norm_modulate', [x, shift, scale, rows], [y, mean, rstd], [options.eps ?? 1e-6])
  if (!wanted) return y
  const forShift = shift !== null && needsGrad(shift)
  const forScale = scale !== null && needsGrad(scale)
  record([x, shift, scale], [y], ([g]) => {
    const dx = Tensor.empty(x.shape, x.dtype)
    const dshift = forShift ? Tensor.empty((shift as Tensor).shape, (shift as Tensor).dtype) : null
    const dscale = forScale ? Tensor.empty((scale as Tensor).shape, (scale as Tensor).dtype) : null
    engine.run('norm_modulate_backward', [x, mean, rstd, scale, rows, g as Tensor], [dx, dshift, dscale], [])
    return [dx, dshift, dscale]
  })
  return y
}

/** (x − mean)/√(var + eps) over the last axis. */
export function layerNorm(x: Tensor, eps = 1e-6): Tensor {
  return normModulate(x, { eps })
}

/**
 * x/√(mean(x²) + eps)·w over the last axis.
 *
 * @param x - [..., d]
 * @param w - [d]
 */
export function rmsNorm(x: Tensor, w: Tensor, eps = 1e-6): Tensor {
  expectFloats('rmsNorm', x, w)
  expectShape('rmsNorm', 'w [d]', w, [x.shape[x.rank - 1] ?? 0])
  const forW = needsGrad(w)
  const wanted = forW || needsGrad(x)
  const y = Tensor.empty(x.shape, x.dtype)
  const rstd = wanted ? Tensor.empty([sizeOf(x.shape.slice(0, -1))], 'f32') : null
  engine.run('rms_norm', [x, w], [y, rstd], [eps])
  if (!wanted) return y
  record([x, w], [y], ([g]) => {
    const dx = Tensor.empty(x.shape, x.dtype)
    const dw = forW ? weightGrad(w) : null
    engine.run(
      'rms_norm_backward',
      [x, w, rstd, g as Tensor],
      [dx, dw?.buffer ?? null],
      [dw?.accumulate ?? 0],
    )
    return [dx, dw?.result() ?? null]
  })
  return y
}
