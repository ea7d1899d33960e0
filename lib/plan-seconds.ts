import { DTYPES, engine } from './engine/engine.ts'
import { attention } from './ops/attention.ts'
import { conv3d } from './ops/conv3d.ts'
import { linear, packWeight } from './ops/matmul.ts'
import { Generator } from './tensor/generator.ts'
import { scope } from './tensor/scope.ts'
import { noGrad } from './tensor/tape.ts'
import { Tensor } from './tensor/tensor.ts'

/** What this machine does in a second. */
export interface Rates {
  /** Multiplications and additions. */
  readonly matmul: number
  readonly attention: number
  readonly conv: number
  /** Bytes of weights that are brought where the kernels want them, from a file that is in memory. */
  readonly read: number
}

/**
 * Measures this machine for about half a second with sizes as they occur in published models; the engine should have
 * nothing else to do. Products are those of a network of this type and rounding.
 */
export async function measureRates(dtype: 'f32' | 'bf16', quantize?: 'int8'): Promise<Rates> {
  const generator = new Generator(1)
  const draw = (...shape: number[]): Tensor => generator.normal(shape, { dtype })
  const rate = async (work: number, op: () => Tensor): Promise<number> => {
    const run = (): void => noGrad(() => scope(op)).dispose()
    run()
    await engine.idle()
    const began = performance.now()
    let count = 0
    do {
      run()
      await engine.idle()
      count++
    } while (performance.now() - began < 120)
    return (count * work * 1000) / (performance.now() - began)
  }
  const tensors: Tensor[] = []
  const own = (t: Tensor): Tensor => {
    tensors.push(t)
    return t
  }
  try {
    const x = own(draw(1024, 1920))
    const w = own(draw(1920, 1920))
    packWeight(w, quantize)
    const q = own(draw(1, 1024, 8, 64))
    const clip = own(draw(1, 3, 48, 80, 256))
    const kernel = own(draw(256, 256, 3, 3, 3))
    const matrix = new Uint8Array(1920 ** 2 * DTYPES[dtype].bytes)
    const sent = (): Tensor => {
      const t = Tensor.empty([1920, 1920], dtype)
      engine.write(t.storage, 0, matrix)
      packWeight(t, quantize)
      return t
    }
    return {
      matmul: await rate(2 * 1024 * 1920 ** 2, () => linear(x, w)),
      attention: await rate(4 * 1024 ** 2 * 8 * 64, () => attention(q, q, q)),
      conv: await rate(2 * 3 * 48 * 80 * 256 ** 2 * 27, () => conv3d(clip, kernel, null, { pad: [2, 1, 1] })),
      read: await rate(matrix.length, sent),
    }
  } finally {
    for (const t of tensors) t.dispose()
  }
}

/** Times of phases by their work; rough, because everything but products and weights that are read again is left out. */
export function secondsOf(
  work: { text: number; linear: number; attention: number; decode: number; read: number },
  rates: Rates,
): { text: number; denoise: number; decode: number; total: number } {
  const text = work.text / rates.matmul
  const denoise = work.linear / rates.matmul + work.attention / rates.attention + work.read / rates.read
  const decode = work.decode / rates.conv
  return { text, denoise, decode, total: text + denoise + decode }
}
