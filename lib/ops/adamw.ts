import { engine } from '../engine/engine.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { expectDType, expectShape } from './check.ts'

/** One update of {@link adamwStep}; all tensors of one shape but `clip`. */
export interface AdamwStep {
  /** f32; not changed. */
  readonly grad: Tensor
  /** f32 [2] of `gradNorm`: the gradient is multiplied by clip[1], and nothing changes when that is not finite. */
  readonly clip?: Tensor | null | undefined
  /** f32, updated. */
  readonly param: Tensor
  /** f32 first moment, updated. */
  readonly m: Tensor
  /** f32 second moment, updated. */
  readonly v: Tensor
  /** bf16 copy of `param`, rewritten. */
  readonly shadow?: Tensor | null | undefined
  readonly lr: number
  readonly beta1: number
  readonly beta2: number
  readonly eps: number
  readonly weightDecay: number
  /** 1 − beta1^t */
  readonly biasCorrection1: number
  /** 1 − beta2^t */
  readonly biasCorrection2: number
}

/**
 * AdamW in place: p ← p − lr·wd·p, then m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g² and
 * p ← p − lr·(m/bc₁)/(√(v/bc₂) + eps).
 */
export function adamwStep(step: AdamwStep): void {
  const { grad, param, m, v } = step
  const clip = step.clip ?? null
  const shadow = step.shadow ?? null
  for (const [name, t] of Object.entries({ grad, m, v })) {
    expectShape('adamwStep', `${name} as param`, t, param.shape)
    expectDType('adamwStep', name, t, 'f32')
  }
  expectDType('adamwStep', 'param', param, 'f32')
  if (clip) {
    expectShape('adamwStep', 'clip [2]', clip, [2])
    expectDType('adamwStep', 'clip', clip, 'f32')
  }
  if (shadow) {
    expectShape('adamwStep', 'shadow as param', shadow, param.shape)
    expectDType('adamwStep', 'shadow', shadow, 'bf16')
  }
  engine.run(
    'adamw',
    [grad, clip],
    [param, m, v, shadow],
    [step.lr, step.beta1, step.beta2, step.eps, step.weightDecay, step.biasCorrection1, step.biasCorrection2],
  )
}
