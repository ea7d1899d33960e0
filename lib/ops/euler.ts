import { engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectShape } from './check.ts'
import { scale } from './pointwise.ts'

/** Options of {@link euler}. */
export interface EulerOptions {
  /** σ_{i+1} − σ_i, negative towards the data. */
  readonly deltaSigma: number
  /** w; used only with an unconditional velocity. Default 1. */
  readonly guidance?: number | undefined
}

/**
 * One Euler step under guidance: x + Δσ·(v_u + w·(v_c − v_u)), or x + Δσ·v_c without v_u. All of one shape.
 */
export function euler(x: Tensor, vCond: Tensor, vUncond: Tensor | null, options: EulerOptions): Tensor {
  const { deltaSigma, guidance = 1 } = options
  expectFloats('euler', x, vCond, vUncond)
  expectShape('euler', 'vCond as x', vCond, x.shape)
  if (vUncond) expectShape('euler', 'vUncond as x', vUncond, x.shape)
  const y = Tensor.empty(x.shape, x.dtype)
  engine.run('euler', [x, vCond, vUncond], [y], [deltaSigma, guidance])
  const [forX, forCond, forUncond] = [needsGrad(x), needsGrad(vCond), needsGrad(vUncond)]
  if (!forX && !forCond && !forUncond) return y
  record([x, vCond, vUncond], [y], ([grad]) => {
    const g = grad as Tensor
    return [
      forX ? g : null,
      forCond ? scale(g, deltaSigma * (vUncond ? guidance : 1)) : null,
      forUncond ? scale(g, deltaSigma * (1 - guidance)) : null,
    ]
  })
  return y
}
