import { cast } from '../ops/cast.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { linearLayer } from './linear.ts'
import type { Weights } from './weights.ts'

/** Width of φ(τ). */
export const TIME_FEATURES = 256

/**
 * φ(τ) = [cos(τ·ω), sin(τ·ω)], ω_i = 10000^(−i/128), rows of 256 (spec/dit-flux.md eq. 1). Every step is rounded to
 * f32 as in the reference: angles reach 1000 rad, where that rounding is visible.
 */
export function timeFeatures(timesteps: ArrayLike<number>): Float32Array {
  const half = TIME_FEATURES / 2
  const features = new Float32Array(timesteps.length * TIME_FEATURES)
  for (let i = 0; i < half; i++) {
    const exponent = Math.fround(Math.fround(-Math.log(10000)) * i) / half
    const frequency = Math.fround(Math.exp(Math.fround(exponent)))
    for (let r = 0; r < timesteps.length; r++) {
      const angle = Math.fround(Math.fround(timesteps[r]) * frequency)
      features[r * TIME_FEATURES + i] = Math.cos(angle)
      features[r * TIME_FEATURES + half + i] = Math.sin(angle)
    }
  }
  return features
}

/** The nearest bfloat16, ties to even. */
export function roundToBf16(x: number): number {
  const bits = new Uint32Array(Float32Array.of(x).buffer)
  bits[0] = (bits[0] + 0x7fff + ((bits[0] >>> 16) & 1)) & 0xffff0000
  return new Float32Array(bits.buffer)[0]
}

/**
 * temb = W2·SiLU(W1·φ) + P2·SiLU(P1·pooled), [R, d], of φ = φ(τ) [R, 256] (spec/dit-flux.md eq. 2); keys below
 * `time_text_embed`.
 */
export function conditioning(
  weights: Weights,
  pooledWidth: number,
  width: number,
): (phi: Tensor, pooled: Tensor) => Tensor {
  const init = { normal: 0.02 }
  const time = weights.sub('timestep_embedder')
  const text = weights.sub('text_embedder')
  const w1 = linearLayer(time.sub('linear_1'), TIME_FEATURES, width, init)
  const w2 = linearLayer(time.sub('linear_2'), width, width, init)
  const p1 = linearLayer(text.sub('linear_1'), pooledWidth, width, init)
  const p2 = linearLayer(text.sub('linear_2'), width, width, init)
  return (phi, pooled) => {
    const fromTime = w2(w1(cast(phi, pooled.dtype), { activation: 'silu' }))
    return p2(p1(pooled, { activation: 'silu' }), { residual: fromTime })
  }
}
