import { type DType, engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { hashNames, mix64, philox, type Seed, words } from './philox.ts'
import { Tensor } from './tensor.ts'

/** Where a generator stands, for a checkpoint; 64-bit ids as decimal strings. */
export interface GeneratorState {
  readonly seed: string
  readonly stream: string
  readonly calls: number
}

const STEP = 0x9e3779b97f4a7c15n

/**
 * A source of random tensors with the same bits on every machine, thread count and backend: Philox keyed by
 * (seed, stream, element). Each draw takes the next stream of its generator; `stream(names)` gives an independent
 * child that depends on the names alone and not on what was drawn before.
 */
export class Generator {
  #seed: bigint
  #stream: bigint
  #calls = 0

  /** @throws ERR_OPTION for a number that is not whole. */
  constructor(seed: Seed, stream: Seed = 0) {
    words(seed, 'seed')
    words(stream, 'stream')
    this.#seed = BigInt.asUintN(64, BigInt(seed))
    this.#stream = BigInt.asUintN(64, BigInt(stream))
  }

  get seed(): bigint {
    return this.#seed
  }

  /** The 64-bit id that, with the seed, tells this generator from all others. */
  get streamId(): bigint {
    return this.#stream
  }

  /** A child named by strings and numbers, e.g. `stream('noise', unit, stage)`. Does not advance this one. */
  stream(...names: readonly (string | number)[]): Generator {
    return new Generator(this.#seed, hashNames(this.#stream, names))
  }

  /** Takes the next stream, for ops that draw by themselves (`renoise`, `blockNoise`). */
  next(): { seed: bigint; stream: bigint } {
    this.#calls++
    return { seed: this.#seed, stream: mix64(this.#stream + BigInt(this.#calls) * STEP) }
  }

  #words(): number[] {
    const { seed, stream } = this.next()
    return [...words(seed), ...words(stream)]
  }

  /** Independent normal numbers. Defaults: mean 0, std 1, f32. */
  normal(
    shape: readonly number[],
    options: { mean?: number | undefined; std?: number | undefined; dtype?: DType | undefined } = {},
  ): Tensor {
    const t = Tensor.empty(shape, options.dtype ?? 'f32')
    const scalars = [options.mean ?? 0, options.std ?? 1, ...this.#words()]
    if (t.size > 0) engine.run('random_normal', [], [t], scalars)
    return t
  }

  /** Independent uniform numbers in [low, high). Defaults: 0, 1, f32. */
  uniform(
    shape: readonly number[],
    options: { low?: number | undefined; high?: number | undefined; dtype?: DType | undefined } = {},
  ): Tensor {
    const t = Tensor.empty(shape, options.dtype ?? 'f32')
    const scalars = [options.low ?? 0, options.high ?? 1, ...this.#words()]
    if (t.size > 0) engine.run('random_uniform', [], [t], scalars)
    return t
  }

  /** The numbers that `uniform([n])` would give at this point, computed here: for decisions that must not wait. */
  hostUniform(n: number): number[] {
    const [s0, s1, t0, t1] = this.#words() as [number, number, number, number]
    const result: number[] = []
    for (let block = 0; result.length < n; block++) {
      for (const word of philox([s0, s1], [t0, t1], block)) {
        if (result.length < n) result.push((word >>> 8) / 0x1000000)
      }
    }
    return result
  }

  /** Where this generator stands. */
  state(): GeneratorState {
    return { seed: String(this.#seed), stream: String(this.#stream), calls: this.#calls }
  }

  /** Goes back to a state; what follows repeats what followed then. @throws ERR_OPTION for a state that is none. */
  restore(state: GeneratorState): this {
    const whole = /^\d+$/
    if (!whole.test(state?.seed) || !whole.test(state?.stream) || !Number.isSafeInteger(state?.calls)) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'Generator.restore',
        expected: '{ seed, stream, calls } as state() gave it',
        received: JSON.stringify(state) ?? 'undefined',
      })
    }
    this.#seed = BigInt(state.seed)
    this.#stream = BigInt(state.stream)
    this.#calls = state.calls
    return this
  }
}
