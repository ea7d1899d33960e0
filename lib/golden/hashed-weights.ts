import { setImmediate } from 'node:timers/promises'
import type { Tensor } from '../tensor/tensor.ts'

/** How the weights that a case does not store are made, in the words of its case.json. */
export interface WeightRecipe {
  gain: number
  /** Half the width of biases. */
  bias: number
  /** Largest value of a linear layer of LPIPS. */
  linear: number
}

const STEP = 0x9e3779b9
const SLICE = 1 << 17

/** The numbers in the recipe's text; the hash itself is the same for all. */
export function recipeOf(lines: readonly string[]): WeightRecipe {
  const text = lines.join('\n')
  const number = (pattern: RegExp, usual: number): number => Number(pattern.exec(text)?.[1] ?? usual)
  return {
    gain: number(/gain (\d+(?:\.\d+)?)/, 1),
    bias: number(/biases: \(2u-1\) \* (\d+(?:\.\d+)?)/, 0.1),
    linear: number(/lin layers: u \* (\d+(?:\.\d+)?)/, 0.5),
  }
}

/** Prefixes of the keys of the two networks, e.g. `perceptual_loss.` and `discriminator.`. */
export function prefixesOf(lines: readonly string[]): { lpips: string; discriminator: string } {
  const [, lpips = '', discriminator = ''] =
    /prefix (\S+) \(LPIPS\) and ([\w.]+\.)/.exec(lines.join('\n')) ?? []
  return { lpips, discriminator }
}

/** Fills f32 parameters with values that depend on their full key and the position alone. */
export async function fillHashed(
  parameters: ReadonlyMap<string, Tensor>,
  prefix: string,
  recipe: WeightRecipe,
): Promise<void> {
  for (const [name, tensor] of parameters) {
    const { size, shape } = tensor
    const bound = shape.length > 1 ? recipe.gain * Math.sqrt((3 * (shape[0] as number)) / size) : recipe.bias
    // u · slope + offset
    const [slope, offset] = name.startsWith('lin') ? [recipe.linear, 0] : [2 * bound, -bound]
    const start = fnv1a(prefix + name)
    const values = new Float32Array(size)
    for (let from = 0; from < size; from += SLICE) {
      for (let i = from; i < Math.min(size, from + SLICE); i++) {
        values[i] = uniform((start + Math.imul(i, STEP)) >>> 0) * slope + offset
      }
      await setImmediate()
    }
    tensor.write(values)
  }
}

function fnv1a(key: string): number {
  let h = 0x811c9dc5
  for (const byte of new TextEncoder().encode(key)) h = Math.imul(h ^ byte, 0x01000193)
  return h >>> 0
}

function uniform(seed: number): number {
  let x = seed
  x = Math.imul(x ^ (x >>> 16), 0x7feb352d)
  x = Math.imul(x ^ (x >>> 15), 0x846ca68b)
  return (((x ^ (x >>> 16)) >>> 0) + 0.5) / 2 ** 32
}
