import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectShape, sharedFlag, weightGrad } from './check.ts'

/** Options of {@link groupNorm}. */
export interface GroupNormOptions {
  /** G, a divisor of C. */
  readonly groups: number
  /** Default 1e-6. */
  readonly eps?: number | undefined
  /** Whether SiLU follows. */
  readonly silu?: boolean | undefined
}

/**
 * Normalises each frame over its pixels and the channels of each group, then ·w + b, then SiLU if asked.
 *
 * @param x - [F, P, C], channels last
 * @param w - [C]
 * @param b - [C]
 */
export function groupNorm(x: Tensor, w: Tensor, b: Tensor, options: GroupNormOptions): Tensor {
  const { groups } = options
  expectFloats('groupNorm', x, w, b)
  expectShape('groupNorm', 'x [F, P, C]', x, [null, null, null])
  const [frames, , channels] = x.shape as [number, number, number]
  expectShape('groupNorm', 'w [C]', w, [channels])
  expectShape('groupNorm', 'b [C]', b, [channels])
  if (!(Number.isInteger(groups) && groups > 0 && channels % groups === 0)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'groupNorm: groups',
      expected: `a divisor of ${channels} channels`,
      received: String(groups),
    })
  }
  const silu = options.silu ? 1 : 0
  const y = Tensor.empty(x.shape, x.dtype)
  const forW = needsGrad(w)
  const forB = needsGrad(b)
  const wanted = forW || forB || needsGrad(x)
  const mean = wanted ? Tensor.empty([frames, groups], 'f32') : null
  const rstd = wanted ? Tensor.empty([frames, groups], 'f32') : null
  engine.run('group_norm', [x, w, b], [y, mean, rstd], [groups, options.eps ?? 1e-6, silu])
  if (!wanted) return y
  record([x, w, b], [y], ([g]) => {
    const dx = Tensor.empty(x.shape, x.dtype)
    const dw = forW ? weightGrad(w) : null
    const db = forB ? weightGrad(b) : null
    const accumulate = sharedFlag(dw, db)
    const outputs = [dx, dw?.buffer ?? null, db?.buffer ?? null]
    engine.run('group_norm_backward', [x, w, b, mean, rstd, g as Tensor], outputs, [groups, silu, accumulate])
    return [dx, dw?.result() ?? null, db?.result() ?? null]
  })
  return y
}
