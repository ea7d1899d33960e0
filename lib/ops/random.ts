import { type DType, engine } from '../engine/engine.ts'
import { type Seed, words } from '../tensor/philox.ts'
import { Tensor } from '../tensor/tensor.ts'

export { Generator } from '../tensor/generator.ts'

/** Which numbers an op draws: the same (seed, stream) always gives the same. */
export interface StreamOptions {
  readonly seed: Seed
  readonly stream: Seed
}

/** The four scalars (seed lo, hi, stream lo, hi) that every drawing op ends with. */
export function streamWords(options: StreamOptions): number[] {
  return [...words(options.seed, 'seed'), ...words(options.stream, 'stream')]
}

/** Normal numbers of one stream. Defaults: mean 0, std 1, f32. `Generator` is the convenient form. */
export function randomNormal(
  shape: readonly number[],
  options: StreamOptions & { mean?: number | undefined; std?: number | undefined; dtype?: DType | undefined },
): Tensor {
  const t = Tensor.empty(shape, options.dtype ?? 'f32')
  const scalars = [options.mean ?? 0, options.std ?? 1, ...streamWords(options)]
  if (t.size > 0) engine.run('random_normal', [], [t], scalars)
  return t
}

/** Uniform numbers in [low, high) of one stream. Defaults: 0, 1, f32. */
export function randomUniform(
  shape: readonly number[],
  options: StreamOptions & { low?: number | undefined; high?: number | undefined; dtype?: DType | undefined },
): Tensor {
  const t = Tensor.empty(shape, options.dtype ?? 'f32')
  const scalars = [options.low ?? 0, options.high ?? 1, ...streamWords(options)]
  if (t.size > 0) engine.run('random_uniform', [], [t], scalars)
  return t
}
