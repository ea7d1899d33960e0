import type { DType } from '../lib/engine/engine.ts'
import { adamwStep } from '../lib/ops/adamw.ts'
import { groupNorm } from '../lib/ops/group-norm.ts'
import { normModulate } from '../lib/ops/norm.ts'
import { rope } from '../lib/ops/rope.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import {
  bareCopy,
  countFor,
  type Effort,
  engineSeconds,
  interleave,
  onGpu,
  type Required,
  type Unnamed,
} from './harness.ts'

// The published width; rows enough that no cache holds the operands.
const WIDTH = 1920
const HEAD_DIM = 64
const CHANNELS = 128

interface Case {
  name: string
  /** Bytes read and written. */
  moved: number
  op: () => Tensor
  owned: Tensor[]
}

/** The other kernels that only move memory, on more of it than the caches hold, against a copy of as many bytes. */
export async function kernels(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  const required: Required = { of: 'ratio', atLeast: onGpu() ? 0.85 : 0.6 }
  for (const make of [normModulateCase, ropeCase, groupNormCase, adamwCase]) {
    for (const dtype of make === adamwCase ? (['f32'] as const) : (['f32', 'bf16'] as const)) {
      const { name, moved, op, owned } = make(dtype, effort.quick ? 256 : onGpu() ? 65_536 : 8192)
      const count = effort.quick ? 1 : await countFor(op, effort.seconds)
      const { ours, ratio } = await interleave(
        effort,
        async () => (1e-9 * moved) / (await engineSeconds(op, count)),
        () => bareCopy(moved, effort.seconds),
      )
      const against = 'memcpy of the same bytes'
      rows.push({ name: `${name}, ${dtype}`, value: ours, unit: 'GB/s', ratio, against, required })
      for (const t of owned) t.dispose()
    }
  }
  return rows
}

function normModulateCase(dtype: DType, count: number): Case {
  const g = new Generator(1)
  const x = g.normal([count, WIDTH], { dtype })
  const [shift, scale] = [g.normal([2, WIDTH], { dtype }), g.normal([2, WIDTH], { dtype })]
  const rows = Tensor.from(Int32Array.from({ length: count }, (_, i) => (2 * i < count ? 0 : 1)))
  return {
    name: `normModulate [${count}, ${WIDTH}]`,
    moved: 2 * x.bytes,
    op: () => normModulate(x, { shift, scale, rows }),
    owned: [x, shift, scale, rows],
  }
}

function ropeCase(dtype: DType, count: number): Case {
  const g = new Generator(2)
  const heads = WIDTH / HEAD_DIM
  const x = g.normal([count, heads, HEAD_DIM], { dtype })
  const weight = g.normal([HEAD_DIM], { dtype })
  const [cos, sin] = [g.uniform([count, HEAD_DIM / 2]), g.uniform([count, HEAD_DIM / 2])]
  return {
    name: `rope with QK norm [${count}, ${heads}, ${HEAD_DIM}]`,
    moved: 2 * x.bytes + cos.bytes + sin.bytes,
    op: () => rope(x, { weight, cos, sin }),
    owned: [x, weight, cos, sin],
  }
}

function groupNormCase(dtype: DType, count: number): Case {
  const g = new Generator(3)
  const [frames, pixels] = [4, 4 * count]
  const x = g.normal([frames, pixels, CHANNELS], { dtype })
  const [w, b] = [g.normal([CHANNELS], { dtype }), g.normal([CHANNELS], { dtype })]
  // Statistics first, then the values again: the input is read twice.
  return {
    name: `groupNorm + SiLU [${frames}, ${pixels}, ${CHANNELS}]`,
    moved: 3 * x.bytes,
    op: () => groupNorm(x, w, b, { groups: 32, silu: true }),
    owned: [x, w, b],
  }
}

function adamwCase(_: DType, count: number): Case {
  const g = new Generator(4)
  const shape = [count, WIDTH]
  const [grad, param, m, v] = [g.normal(shape), g.normal(shape), g.normal(shape), g.uniform(shape)]
  const shadow = Tensor.zeros(shape, 'bf16')
  const step = { grad, param, m, v, shadow, lr: 1e-6, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 1e-4 }
  return {
    name: `adamw [${count}, ${WIDTH}], f32 state and bf16 copy`,
    moved: grad.bytes + 2 * (param.bytes + m.bytes + v.bytes) + shadow.bytes,
    op: () => {
      adamwStep({ ...step, biasCorrection1: 0.5, biasCorrection2: 0.5 })
      return Tensor.empty([1])
    },
    owned: [grad, param, m, v, shadow],
  }
}
