import { PyraflowError } from '../engine/errors.ts'
import { shuffle } from '../tensor/shuffle.ts'
import type { LatentBucket, LatentSource } from './latent-source.ts'

/** Samples of a batch that have one latent size. */
export interface BatchPart {
  /** Clips, all of one bucket; the one at i belongs to column i mod `columns.length`. */
  readonly indices: readonly number[]
  /** [C, T, H, W] of the bucket. */
  readonly shape: readonly number[]
  /** Stage of each column. */
  readonly columns: readonly number[]
  /** Train on the first frames alone. */
  readonly still: boolean
}

/** What one (micro-)step trains on. */
export interface Batch {
  /** Samples of a column, the same for all columns of all parts. */
  readonly rows: number
  readonly parts: readonly BatchPart[]
  /** Number of this batch among those that hold videos, from 1: it decides the lengths (spec/training.md §2). */
  readonly counter: number
}

export interface BatchOrderOptions {
  /** Samples a batch; a multiple of the columns. */
  batchSize: number
  /** Stage of each column of one set of samples, e.g. [0, 1, 1, 2]. */
  columns: readonly number[]
  /** Share of image samples; absent = clips as they come. */
  imageRatio?: number | undefined
  /** Where image samples come from; default: from buckets of single frames if there are any, else from first frames. */
  images?: 'buckets' | 'frames' | 'both' | undefined
  seed: number
}

interface Drawn {
  readonly indices: readonly number[]
  readonly shape: readonly number[]
  readonly still: boolean
}

interface Pool extends LatentBucket {
  readonly still: boolean
}

/**
 * Which clips make up which batch, as a pure function of the batch's number: resuming needs no other state. A batch is
 * made of whole sets of samples, one a column; with `imageRatio` some sets are images, at exactly that share in the long
 * run, packed into the same network call.
 *
 * @throws ERR_OPTION when the source has no clips of the kind that is asked for.
 */
export class BatchOrder {
  readonly #options: BatchOrderOptions
  readonly #sets: number
  readonly #ratio: number
  readonly #videos: Stream | undefined
  readonly #images: Stream | undefined

  constructor(source: Pick<LatentSource, 'buckets'>, options: BatchOrderOptions) {
    const { batchSize, columns, imageRatio, seed } = options
    this.#options = options
    this.#sets = batchSize / columns.length
    this.#ratio = imageRatio ?? 0
    const filled = source.buckets.filter(({ indices }) => indices.length > 0)
    const pools = imageRatio === undefined ? filled.map(moving) : filled.filter(isVideo).map(moving)
    const images = imageRatio ? imagePools(filled, options.images) : []
    for (const [list, what, wanted] of [
      [pools, 'videos', this.#ratio < 1],
      [images, 'images', this.#ratio > 0],
    ] as const) {
      if (list.length > 0 || !wanted) continue
      throw new PyraflowError('ERR_OPTION', {
        what: `imageRatio ${imageRatio ?? ''}`.trim(),
        expected: `a data set with ${what}`,
        received:
          filled.map(({ shape, indices }) => `${indices.length} of [${shape}]`).join(', ') || 'no clips',
        remedy: 'Leave imageRatio out to train on clips as they come, or choose other images.',
      })
    }
    // A stream hands out batches of the most sets that one step may want of it.
    const size = (sets: number): number => sets * columns.length
    const share = this.#ratio * this.#sets
    if (this.#ratio < 1) this.#videos = new Stream(pools, size(this.#sets - Math.floor(share)), seed)
    if (this.#ratio > 0) this.#images = new Stream(images, size(Math.ceil(share)), seed + 1)
  }

  /** Batch number `n`, from 0. */
  at(n: number): Batch {
    const imagesBefore = Math.floor(this.#ratio * this.#sets * n)
    const images = Math.floor(this.#ratio * this.#sets * (n + 1)) - imagesBefore
    const videos = this.#sets - images
    // Batches before this one that held any: all of them, or as many as there were sets.
    const rounds = (before: number, most: number): number => (most > 1 ? n : before)
    const counter =
      1 + rounds(this.#sets * n - imagesBefore, this.#sets - Math.floor(this.#ratio * this.#sets))
    const imageTurn = rounds(imagesBefore, Math.ceil(this.#ratio * this.#sets))
    return this.#batch(counter, [
      { sets: videos, from: videos > 0 ? this.#videos?.at(counter - 1) : undefined },
      { sets: images, from: images > 0 ? this.#images?.at(imageTurn) : undefined },
    ])
  }

  /** A batch of every kind that there can be: each bucket with each, in both shares that rounding leaves. */
  kinds(): Batch[] {
    const share = this.#ratio * this.#sets
    return [...new Set([Math.floor(share), Math.ceil(share)])].flatMap((images) => {
      const videos = this.#sets - images
      const moving = videos > 0 ? (this.#videos?.kinds() ?? []) : [undefined]
      const still = images > 0 ? (this.#images?.kinds() ?? []) : [undefined]
      return moving.flatMap((a) =>
        still.map((b) =>
          this.#batch(1, [
            { sets: videos, from: a },
            { sets: images, from: b },
          ]),
        ),
      )
    })
  }

  #batch(counter: number, parts: readonly { sets: number; from: Drawn | undefined }[]): Batch {
    const { columns } = this.#options
    const rows = parts.reduce((n, { sets }) => gcd(n, sets), 0)
    return {
      rows,
      counter,
      parts: parts.flatMap(({ sets, from }) =>
        from
          ? {
              indices: from.indices.slice(0, sets * columns.length),
              columns: new Array<readonly number[]>(sets / rows).fill(columns).flat(),
              shape: from.shape,
              still: from.still,
            }
          : [],
      ),
    }
  }
}

const isVideo = ({ shape }: LatentBucket): boolean => (shape[1] as number) > 1
const moving = (bucket: LatentBucket): Pool => ({ ...bucket, still: false })

function imagePools(buckets: readonly LatentBucket[], from: BatchOrderOptions['images']): Pool[] {
  const images = buckets.filter((bucket) => !isVideo(bucket)).map(moving)
  const frames = buckets.filter(isVideo).map((bucket) => ({ ...bucket, still: true }))
  if (from === 'both') return [...images, ...frames]
  return from === 'frames' || (from === undefined && images.length === 0) ? frames : images
}

const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b))

/**
 * Batches of a fixed size from several buckets. In a round every bucket has as many batches as its clips fill, at least
 * one, in shuffled order; inside a bucket shuffled epochs lie end to end, so that no clip is left out.
 */
class Stream {
  readonly #pools: readonly Pool[]
  readonly #size: number
  readonly #seed: number
  readonly #counts: readonly number[]
  readonly #round: readonly number[]
  #shuffled: { n: number; seed: number; order: Uint32Array }[] = []

  constructor(pools: readonly Pool[], size: number, seed: number) {
    this.#pools = pools
    this.#size = size
    this.#seed = seed
    this.#counts = pools.map(({ indices }) => Math.max(1, Math.round(indices.length / size)))
    this.#round = this.#counts.flatMap((count, b) => new Array<number>(count).fill(b))
  }

  /** A batch of every bucket. */
  kinds(): Drawn[] {
    return this.#pools.map(({ indices: clips, shape, still }) => ({
      indices: Array.from({ length: this.#size }, (_, i) => clips[i % clips.length] as number),
      ...{ shape, still },
    }))
  }

  at(n: number): Drawn {
    const place = n % this.#round.length
    const round = Math.floor(n / this.#round.length)
    const order = this.#order(this.#round.length, this.#seed + round)
    const bucketAt = (i: number): number => this.#round[order[i] as number] as number
    const bucket = bucketAt(place)
    let earlier = round * (this.#counts[bucket] as number)
    for (let i = 0; i < place; i++) if (bucketAt(i) === bucket) earlier++
    const { indices: clips, shape, still } = this.#pools[bucket] as Pool
    const indices = Array.from({ length: this.#size }, (_, i) => {
      const at = earlier * this.#size + i
      const epoch = this.#order(clips.length, this.#seed + Math.floor(at / clips.length))
      return clips[epoch[at % clips.length] as number] as number
    })
    return { indices, shape, still }
  }

  #order(n: number, seed: number): Uint32Array {
    const known = this.#shuffled.find((s) => s.n === n && s.seed === seed)
    if (known) return known.order
    const order = shuffle(n, seed)
    // A batch looks at a round and at two epochs of a bucket; a few more keep neighbouring buckets at hand.
    this.#shuffled = [{ n, seed, order }, ...this.#shuffled.slice(0, 7)]
    return order
  }
}
