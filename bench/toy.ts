import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { VOCABULARY } from '../examples/shapes/world.ts'
import { WordEncoder } from '../lib/text/word-encoder.ts'
import { writeLatents } from '../lib/train/latent-cache.ts'
import { LatentDataset } from '../lib/train/latents.ts'

export const PROMPT = 'a red circle moving right on a black background'

export const NORMALISATION = { image: { shift: 0, scale: 1 }, video: { shift: 0, scale: 1 } }

export function wordEncoder(): WordEncoder {
  return new WordEncoder({ vocabulary: VOCABULARY, dim: 64, maxLength: 12, seed: 7 })
}

/** A latent cache of `count` clips of noise, by default 25 frames of 128×128, for `use` only. */
export async function withRandomLatents<T>(
  count: number,
  use: (data: LatentDataset) => Promise<T>,
  shape: readonly number[] = [16, 4, 16, 16],
): Promise<T> {
  const dir = await mkdtemp(join(tmpdir(), 'pyraflow-bench-'))
  try {
    const size = count * shape.reduce((a, b) => a * b, 1)
    // Between −1 and 1, in bf16: sign and fraction at random, exponent of 1/2 or 1/4.
    const mean = Uint16Array.from({ length: size }, (_, i) => {
      const bits = Math.imul(i + 1, 0x9e3779b1) >>> 16
      return (bits & 0x80ff) | 0x3e80
    })
    const logvar = new Uint16Array(size).fill(0xc0a0)
    const captions = new Array<string>(count).fill(PROMPT)
    await writeLatents(dir, { shape, mean, logvar, captions, normalisation: NORMALISATION })
    const data = await LatentDataset.open(dir)
    try {
      return await use(data)
    } finally {
      data.dispose()
    }
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
}
