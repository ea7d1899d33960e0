import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import type { LatentNormalisation } from '../flow/normalise.ts'
import { cast } from '../ops/cast.ts'
import { scope } from '../tensor/scope.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { type CacheHeader, readIndex, SHARDS } from './cache-index.ts'
import type { LatentBucket, LatentSource } from './latent-source.ts'
import { MappedShards, type RowPlace } from './mapped-shards.ts'

/** What the rows of a latent cache are; raised when the same key would stand for other numbers. */
export const LATENTS = 'pyraflow-latents-2'

/** First line of the index. */
export interface LatentIndex extends CacheHeader {
  readonly normalisation: LatentNormalisation
  /** Shapes [C, T, H, W]. */
  readonly buckets: readonly (readonly number[])[]
  /** Files, and the buckets that they belong to. */
  readonly shards: readonly { readonly file: string; readonly bucket: number }[]
}

/** A line of the index: a clip of the data set. */
export interface LatentLine {
  readonly key: string
  /** The clip as the data set spells it. */
  readonly clip: string
  readonly text: string
}

/**
 * A latent cache ({@link encodeLatents}) in native memory: batches are gathered there, nothing passes through JavaScript.
 */
export class LatentDataset implements LatentSource {
  readonly captions: readonly string[]
  readonly normalisation: LatentNormalisation
  readonly buckets: readonly LatentBucket[]
  readonly #shards: MappedShards
  readonly #places: readonly RowPlace[]
  readonly #bucketOf: Int32Array

  private constructor(index: LatentIndex, lines: readonly LatentLine[], dir: string, shards: MappedShards) {
    const damaged = (what: string, expected: string, received: string): PyraflowError =>
      new PyraflowError('ERR_CHECKPOINT', { what, expected, received, remedy: 'Encode the data set again.' })
    for (const [i, { file, bucket }] of index.shards.entries()) {
      for (const name of ['mean', 'logvar']) {
        const { dtype, shape } = shards.entry(i, name)
        const expected = index.buckets[bucket]
        if (dtype === 'BF16' && shape.slice(1).join() === expected?.join()) continue
        throw damaged(join(dir, SHARDS, file), `bf16 [n, ${expected}]`, `${dtype} [${shape}]`)
      }
    }
    this.captions = lines.map(({ text }) => text)
    this.normalisation = index.normalisation
    this.#shards = shards
    this.#places = lines.map(({ key, clip }) => {
      const place = shards.place(key)
      if (place) return place
      throw damaged(`latent cache ${dir}`, `latents of ${clip}`, 'none in its shards')
    })
    this.#bucketOf = Int32Array.from(this.#places, ({ shard }) => index.shards[shard]?.bucket as number)
    this.buckets = index.buckets.map((shape, b) => {
      const indices = lines.map((_, i) => i).filter((i) => this.#bucketOf[i] === b)
      return { shape, indices: Int32Array.from(indices) }
    })
  }

  get length(): number {
    return this.captions.length
  }

  /** @throws ERR_IO when there is no latent cache in the folder; ERR_CHECKPOINT when it is damaged or of another kind. */
  static async open(dir: string): Promise<LatentDataset> {
    const { header, lines } = await readIndex<LatentIndex, LatentLine>(dir, LATENTS, '`pyraflow encode`')
    const paths = header.shards.map(({ file }) => join(dir, SHARDS, file))
    const shards = MappedShards.open(paths, LATENTS, ['mean', 'logvar'])
    try {
      return new LatentDataset(header, lines, dir, shards)
    } catch (error) {
      shards.dispose()
      throw error
    }
  }

  /** Posterior of the clips at `indices`, of one bucket: mean and logvar, f32 [B, C, T, H, W]. @throws ERR_OPTION */
  gather(indices: readonly number[]): { mean: Tensor; logvar: Tensor } {
    const bucket = this.#bucketOf[indices[0] as number]
    if (bucket === undefined || indices.some((i) => this.#bucketOf[i] !== bucket)) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'positions in a latent cache',
        expected: `some of one bucket, from 0 to ${this.length - 1}`,
        received: `${indices.join(', ') || 'none'}`,
      })
    }
    const { shape } = this.buckets[bucket] as LatentBucket
    const places = indices.map((i) => this.#places[i] as RowPlace)
    return scope(() => {
      const pick = (name: string): Tensor =>
        cast(this.#shards.gather(name, places), 'f32').view([indices.length, ...shape])
      return { mean: pick('mean'), logvar: pick('logvar') }
    })
  }

  dispose(): void {
    this.#shards.dispose()
  }
}
