import { spawn } from 'node:child_process'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { expect } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { add, mul } from '../lib/ops/pointwise.ts'
import { sum } from '../lib/ops/reduce.ts'
import { scope } from '../lib/tensor/scope.ts'
import { backward, noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'

/** Values in (−1, 1) that look random and are the same every time. */
export function numbers(n: number, seed = 1): Float32Array {
  let state = seed * 2654435761
  return Float32Array.from({ length: n }, () => {
    state = (Math.imul(state ^ (state >>> 15), 0x2c1b3c6d) + 0x6d2b79f5) | 0
    return ((state >>> 8) / 0x1000000) * 2 - 1
  })
}

let tensorsMade = 0

/** An f32 tensor of such values, moved and scaled. */
export function random(shape: readonly number[], options: { scale?: number; offset?: number } = {}): Tensor {
  const { scale = 1, offset = 0 } = options
  const n = shape.reduce((a, b) => a * b, 1)
  return Tensor.from(
    numbers(n, ++tensorsMade).map((x) => x * scale + offset),
    shape,
  )
}

export interface GradcheckOptions {
  /** Step of the differences. */
  eps?: number
  /** Allowed difference relative to the largest gradient (at least 1e-2). */
  tolerance?: number
}

// Fourth order, so that the step may be large beside the rounding of f32 outputs.
const STENCIL: readonly (readonly [number, number])[] = [
  [1, 8 / 12],
  [-1, -8 / 12],
  [2, -1 / 12],
  [-2, 1 / 12],
]

/**
 * Compares the tape's gradients of a weighted sum of fn's outputs with central differences, for every element of every
 * input. Also checks that a run without gradients gives the same values.
 */
export async function gradcheck(
  fn: (...inputs: Tensor[]) => Tensor | Tensor[],
  inputs: readonly Tensor[],
  { eps = 0.03, tolerance = 2e-3 }: GradcheckOptions = {},
): Promise<void> {
  const run = (...args: Tensor[]): Tensor[] => [fn(...args)].flat()
  const values = await Promise.all(inputs.map((t) => t.floats()))
  const base = noGrad(() => run(...inputs))
  const plain = await Promise.all(base.map((t) => t.floats()))
  const weights = plain.map((v, i) => numbers(v.length, 77 + i))

  const leaves = inputs.map((t, i) => {
    const leaf = Tensor.from(values[i] as Float32Array, t.shape)
    leaf.requiresGrad = true
    return leaf
  })
  const recorded = scope(() => {
    const outputs = run(...leaves)
    const seeds = outputs.map((t, i) => Tensor.from(weights[i] as Float32Array, t.shape))
    // Several outputs are weighed into one loss.
    const root = outputs.length === 1 ? (outputs[0] as Tensor) : null
    if (root) backward(root, seeds[0])
    else backward(dot(outputs, seeds))
    return outputs
  })
  for (const [i, t] of recorded.entries()) {
    const [a, b] = [await t.floats(), plain[i] as Float32Array]
    expect(worst(a, b), 'the recorded value differs from the plain one').toBeLessThan(1e-5)
  }

  for (const [i, leaf] of leaves.entries()) {
    const value = values[i] as Float32Array
    const reads: Promise<number>[] = []
    for (let e = 0; e < value.length; e++) {
      for (const [step, factor] of STENCIL) {
        const moved = value.slice()
        moved[e] = (value[e] as number) + step * eps
        // What f32 made of the step is the step.
        const actual = (moved[e] as number) - (value[e] as number)
        const outputs = noGrad(() =>
          scope(() => run(...inputs.map((t, j) => (j === i ? Tensor.from(moved, t.shape) : t)))),
        )
        reads.push(
          Promise.all(outputs.map((t) => t.floats())).then((all) => {
            for (const t of outputs) t.dispose()
            let total = 0
            for (const [o, v] of all.entries()) {
              for (const [k, x] of v.entries()) total += x * ((weights[o] as Float32Array)[k] as number)
            }
            return (total * factor * step) / actual
          }),
        )
      }
    }
    const terms = await Promise.all(reads)
    const expected = Float64Array.from({ length: value.length }, (_, e) =>
      terms.slice(4 * e, 4 * e + 4).reduce((a, b) => a + b, 0),
    )
    expect(leaf.grad, `input ${i} has no gradient`).not.toBeNull()
    const got = await (leaf.grad as Tensor).floats()
    expect((leaf.grad as Tensor).shape).toEqual(leaf.shape)
    expect(
      worst(got, expected),
      `gradient of input ${i}: got ${got.slice(0, 6)}… for ${expected.slice(0, 6)}…`,
    ).toBeLessThan(tolerance)
    leaf.grad?.dispose()
    leaf.dispose()
  }
  for (const t of [...recorded, ...base]) t.dispose()
}

function dot(outputs: Tensor[], seeds: Tensor[]): Tensor {
  const terms = outputs.map((t, i) => sum(mul(t, seeds[i] as Tensor)))
  return terms.reduce((a, b) => add(a, b))
}

/** Largest difference relative to the largest value. */
export function worst(a: ArrayLike<number>, b: ArrayLike<number>): number {
  expect(a.length).toBe(b.length)
  let [difference, size] = [0, 1e-2]
  for (let i = 0; i < a.length; i++) {
    const d = Math.abs((a[i] as number) - (b[i] as number))
    if (!(d <= difference)) difference = d
    size = Math.max(size, Math.abs(b[i] as number))
  }
  return difference / size
}

setFlagsFromString('--expose-gc')
const collectGarbage: () => void = runInNewContext('gc')

/** Bytes in tensors that someone still holds: tensors forgotten by earlier tests are collected first. */
export async function live(): Promise<number> {
  for (let i = 0; i < 2; i++) {
    collectGarbage()
    // Finalizers are tasks of their own.
    await new Promise((resolve) => setTimeout(resolve, 1))
  }
  await engine.idle()
  return engine.memory().live
}

const root = dirname(dirname(fileURLToPath(import.meta.url)))

/** Runs module source in a Node process of its own (imports relative to the package root) and gives what it printed. */
export function child(
  source: string,
  env: Record<string, string> = {},
): Promise<{ code: number; output: string }> {
  const hooks = `--import=${join(root, 'test/ts-hooks.mjs')}`
  const started = spawn(process.execPath, [hooks, '--input-type=module', '-e', source], {
    cwd: root,
    env: { ...process.env, ...env },
  })
  let output = ''
  for (const stream of [started.stdout, started.stderr]) {
    stream.on('data', (text) => {
      output += text
    })
  }
  return new Promise((resolve, reject) => {
    started.on('error', reject)
    started.on('close', (code) => resolve({ code: code ?? -1, output: output.trim() }))
  })
}
