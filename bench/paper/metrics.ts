import { concat, slice } from '../../lib/ops/copy.ts'
import { downsample } from '../../lib/ops/downsample.ts'
import { matmul } from '../../lib/ops/matmul.ts'
import { axpby } from '../../lib/ops/pointwise.ts'
import { upsample } from '../../lib/ops/upsample.ts'
import { Generator } from '../../lib/tensor/generator.ts'
import { scope } from '../../lib/tensor/scope.ts'
import { noGrad } from '../../lib/tensor/tape.ts'
import type { Tensor } from '../../lib/tensor/tensor.ts'

const PROJECTIONS = 128

/** Three octaves of pictures [N, C, T, h, w]: what halving twice leaves, and the details of either size. */
function octaves(x: Tensor): Tensor[] {
  const half = downsample(x, 1)
  const quarter = downsample(half, 1)
  return [quarter, axpby(half, upsample(quarter), 1, -1), axpby(x, upsample(half), 1, -1)]
}

/** Columns of x [N, D] along random directions, each sorted: [PROJECTIONS][N]. */
async function projected(x: Tensor, seed: number): Promise<Float32Array[]> {
  const rows = x.shape[0] as number
  const y = noGrad(() =>
    scope(() => {
      const flat = x.view([rows, x.size / rows])
      const directions = new Generator(seed).normal([x.size / rows, PROJECTIONS], {
        std: Math.sqrt(rows / x.size),
      })
      return matmul(flat, directions)
    }),
  )
  const values = await y.floats()
  y.dispose()
  return Array.from({ length: PROJECTIONS }, (_, k) =>
    Float32Array.from({ length: rows }, (_, i) => values[i * PROJECTIONS + k] as number).sort(),
  )
}

/**
 * Sliced Wasserstein distance of two sets of as many pictures [N, C, T, h, w], per octave of detail, each relative to the
 * spread of the second set in it, and their mean. Two samples of one distribution have a distance too: compare with that.
 */
export async function distance(a: Tensor, b: Tensor): Promise<number> {
  const [x, y] = noGrad(() => scope(() => [octaves(a), octaves(b)] as const))
  let sum = 0
  for (const [k, own] of x.entries()) {
    const [p, q] = [await projected(own, k), await projected(y[k] as Tensor, k)]
    let [gap, spread] = [0, 0]
    for (let j = 0; j < PROJECTIONS; j++) {
      const [u, v] = [p[j] as Float32Array, q[j] as Float32Array]
      const mean = v.reduce((n, value) => n + value, 0) / v.length
      for (let i = 0; i < u.length; i++) {
        gap += Math.abs((u[i] as number) - (v[i] as number))
        spread += Math.abs((v[i] as number) - mean)
      }
    }
    sum += gap / spread / x.length
  }
  for (const t of [...x, ...y]) t.dispose()
  return sum
}

/**
 * How much more alike neighbours are inside an aligned 2×2 block than across the blocks' borders: 0 for pictures that know
 * nothing of blocks. Horizontal neighbours of x [N, C, T, h, w], as a difference of correlations.
 */
export async function blockExcess(x: Tensor): Promise<number> {
  const values = await x.floats()
  const w = x.shape.at(-1) as number
  const mean = values.reduce((n, v) => n + v, 0) / values.length
  const variance = values.reduce((n, v) => n + (v - mean) ** 2, 0) / values.length
  const sums = { inside: 0, across: 0 }
  const counts = { inside: 0, across: 0 }
  for (let i = 0; i + 1 < values.length; i++) {
    if ((i + 1) % w === 0) continue
    const where = i % 2 === 0 ? 'inside' : 'across'
    sums[where] += ((values[i] as number) - mean) * ((values[i + 1] as number) - mean)
    counts[where]++
  }
  return (sums.inside / counts.inside - sums.across / counts.across) / variance
}

/** Mean square of the finest octave of x [N, C, T, h, w]. */
export async function fineEnergy(x: Tensor): Promise<number> {
  const fine = noGrad(() => scope(() => octaves(x)[2] as Tensor))
  const values = await fine.floats()
  fine.dispose()
  return values.reduce((n, v) => n + v * v, 0) / values.length
}

/** One latent frame of x [N, C, T, h, w]. */
export const frameOf = (x: Tensor, frame: number): Tensor => noGrad(() => slice(x, 2, frame, 1))

export function joinRows(parts: readonly Tensor[]): Tensor {
  const all = noGrad(() => scope(() => concat([...parts], 0)))
  for (const part of parts) part.dispose()
  return all
}

export interface Spread {
  readonly mean: number
  readonly std: number
}

/** Mean and standard deviation over seeds. */
export function spreadOf(values: readonly number[]): Spread {
  const mean = values.reduce((a, b) => a + b, 0) / values.length
  const square = values.reduce((a, b) => a + (b - mean) ** 2, 0)
  return { mean, std: values.length > 1 ? Math.sqrt(square / (values.length - 1)) : 0 }
}
