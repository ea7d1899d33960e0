import { linear, packWeight } from '../lib/ops/matmul.ts'
import { Generator } from '../lib/tensor/generator.ts'
import {
  bareMatmul,
  countFor,
  type Effort,
  engineSeconds,
  hasInt8,
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
    for (const what of ['bf16', 'f32', ...(hasInt8() ? (['int8'] as const) : [])] as const) {
      const rounds = effort.quick ? 1 : effort.rounds
      // Eight bits are how a product of bf16 is rounded, which counts here.
      const dtype = what === 'int8' ? 'bf16' : what
      const theirs = what === 'int8' ? what : await productDtype(dtype)
      const generator = new Generator(1)
      const x = generator.normal([m, k], { dtype })
      const weight = generator.normal([n, k], { dtype, std: 0.02 })
      packWeight(weight, what === 'int8' ? what : 'plain')
      const op = () => linear(x, weight)
      const count = effort.quick ? 1 : await countFor(op, effort.seconds)
      const { ours, ratio } = await interleave(
        { ...effort, rounds },
        async () => (2e-9 * m * n * k) / (await engineSeconds(op, count)),
        () => bareMatmul(m, n, k, theirs, effort.seconds),
      )
      rows.push({
        name: `linear ${m}×${k}×${n} ${what}`,
        value: ours,
        unit: 'GFLOP/s',
        ratio,
        against: `${productLibrary()} in a bare loop${theirs === what ? '' : `, in ${theirs}`}`,
        ...(required && what !== 'int8' && { required }),
      })
      x.dispose()
      weight.dispose()
    }
  }
  return rows
}
