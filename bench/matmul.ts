import { linear, packWeight } from '../lib/ops/matmul.ts'
import { Generator } from '../lib/tensor/generator.ts'
import {
  bareMatmul,
  countFor,
  type Effort,
  engineSeconds,
  interleave,
  productDtype,
  productLibrary,
  type Required,
  type Unnamed,
} from './harness.ts'

// [M, K, N]: an MLP of the published transformer over one 384p unit, and its square projections over two.
const SHAPES: [number, number, number, Required | undefined][] = [
  [1088, 1920, 7680, { of: 'ratio', atLeast: 0.9 }],
  [2048, 1920, 1920, undefined],
]

/** `linear` with packed weights through the public API against oneDNN, or cuBLASLt, called in a bare loop. */
export async function matmul(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  for (const [m, k, n, required] of SHAPES) {
    for (const dtype of ['bf16', 'f32'] as const) {
      const rounds = effort.quick ? 1 : effort.rounds
      const theirs = await productDtype(dtype)
      const generator = new Generator(1)
      const x = generator.normal([m, k], { dtype })
      const weight = generator.normal([n, k], { dtype, std: 0.02 })
      packWeight(weight)
      const op = () => linear(x, weight)
      const count = effort.quick ? 1 : await countFor(op, effort.seconds)
      const { ours, ratio } = await interleave(
        { ...effort, rounds },
        async () => (2e-9 * m * n * k) / (await engineSeconds(op, count)),
        () => bareMatmul(m, n, k, theirs, effort.seconds),
      )
      rows.push({
        name: `linear ${m}×${k}×${n} ${dtype}`,
        value: ours,
        unit: 'GFLOP/s',
        ratio,
        against: `${productLibrary()} in a bare loop${theirs === dtype ? '' : `, in ${theirs}`}`,
        ...(required && { required }),
      })
      x.dispose()
      weight.dispose()
    }
  }
  return rows
}
