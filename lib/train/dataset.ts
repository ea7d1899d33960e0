import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { loadImage } from '../io/image.ts'
import type { VideoBackend, VideoInfo } from '../io/video.ts'
import { videoBackend } from '../io/webcodecs.ts'
import { shuffle } from '../tensor/shuffle.ts'
import { ahead, DECODERS } from './ahead.ts'
import { type BadItem, BadItems, type OnBad } from './bad-items.ts'
import { type Bucket, bucketName, checkBuckets } from './buckets.ts'
import { type DatasetItem, type Listed, listDataset } from './dataset-list.ts'
import { clipInfo, placeItem, tooShort } from './place-item.ts'

export { shuffle } from '../tensor/shuffle.ts'
export type { DatasetItem } from './dataset-list.ts'

/** What becomes of a clip with fewer frames than its bucket: it cannot be used, or is repeated from its start. */
export type ShortClips = 'reject' | 'repeat'

interface ReadingOptions {
  /** Resample clips to this rate (frames per second); default: as they are. */
  fps?: number | undefined
  /** Default `reject`. */
  short?: ShortClips | undefined
  /** Use only the first entries of the list. */
  limit?: number | undefined
  /** What becomes of entries that cannot be used; default `fail`. */
  onBad?: OnBad | undefined
  /** Is told of every entry that is left out; default: a process warning each. */
  onBadItem?: ((item: BadItem) => void) | undefined
  /** Keep decoded clips in memory up to this many bytes; default 0. */
  cacheBytes?: number | undefined
  /** Default: the ffmpeg program, else the optional npm decoder. */
  backend?: VideoBackend | undefined
}

/** One size for all clips, or several buckets. */
export type DatasetOptions = ReadingOptions &
  ((Bucket & { buckets?: undefined }) | { buckets: readonly Bucket[]; width?: undefined })

type Placed =
  | { item: DatasetItem; index: number; info: VideoInfo | undefined; bad?: undefined }
  | { item?: undefined; bad: BadItem }

/** How opening is run. */
export interface OpenOptions {
  signal?: AbortSignal | undefined
  onProgress?: ((done: number, total: number) => void) | undefined
}

export interface ClipBatch {
  /** Positions in the data set. */
  indices: number[]
  text: string[]
  /** u8 RGB, [indices.length, frames, height, width, 3]. */
  frames: Uint8Array
}

export interface BatchOptions {
  batchSize: number
  seed: number
  epoch: number
  /** Epochs to go on for, 1; may be infinite. */
  epochs?: number
  /** Batches of the first epoch that were already trained on; they are skipped without being decoded. */
  skip?: number
  signal?: AbortSignal | undefined
}

/**
 * Clips and their captions. Opening checks every entry; decoding happens clip by clip, outside this thread.
 */
export class Dataset {
  readonly buckets: readonly Bucket[]
  readonly fps: number | undefined
  readonly short: ShortClips
  readonly backend: VideoBackend
  readonly #items: readonly DatasetItem[]
  readonly #bucketOf: Int32Array
  readonly #infos: readonly (VideoInfo | undefined)[] | undefined
  readonly #bad: BadItems
  readonly #short = new Set<number>()
  readonly #rejected = new Set<number>()
  readonly #cacheBytes: number
  readonly #decoded = new Map<number, Uint8Array>()
  #decodedBytes = 0

  /** @param known - bucket of each item (default: the first), what its container says, and what was left out */
  constructor(
    items: readonly DatasetItem[],
    options: DatasetOptions & { backend: VideoBackend },
    known: { bucketOf?: Int32Array; infos?: readonly (VideoInfo | undefined)[]; bad?: BadItems } = {},
  ) {
    this.buckets = bucketsOf(options)
    this.fps = options.fps
    this.short = options.short ?? 'reject'
    this.backend = options.backend
    this.#items = items
    this.#bucketOf = known.bucketOf ?? new Int32Array(items.length)
    this.#infos = known.infos
    this.#bad = known.bad ?? new BadItems(options.onBad, options.onBadItem)
    this.#cacheBytes = options.cacheBytes ?? 0
  }

  get length(): number {
    return this.#items.length
  }

  /** Entries that were left out so far. */
  get bad(): readonly BadItem[] {
    return this.#bad.items
  }

  /** The size of all clips. @throws ERR_OPTION when there are several */
  get options(): Bucket {
    if (this.buckets.length === 1) return this.buckets[0] as Bucket
    throw new PyraflowError('ERR_OPTION', {
      what: 'data set',
      expected: 'clips of one size',
      received: `buckets ${this.buckets.map(bucketName).join(', ')}`,
      remedy: 'open it with one width, height and frames',
    })
  }

  /** Path and caption at position `i`; throws `ERR_OPTION` outside [0, length). */
  item(i: number): DatasetItem {
    const item = this.#items[i]
    if (item) return item
    throw new PyraflowError('ERR_OPTION', {
      what: 'data set position',
      expected: `an integer from 0 to ${this.length - 1}`,
      received: String(i),
      remedy: 'stay below dataset.length',
    })
  }

  /** Index of the bucket of clip `i`. @throws ERR_OPTION as {@link item} */
  bucketOf(i: number): number {
    this.item(i)
    return this.#bucketOf[i] as number
  }

  /**
   * Decodes clip `i` to u8 RGB [frames, height, width, 3], exactly as its bucket is: scaled to cover the size, centre
   * cropped (spec/training.md §4).
   *
   * @throws PyraflowError `ERR_IO` naming the clip if it is unreadable or too short, `ERR_ABORTED` after `signal`
   */
  async load(i: number, signal?: AbortSignal): Promise<Uint8Array> {
    const known = this.#decoded.get(i)
    if (known) return known
    throwIfAborted(signal, 'decoding')
    const frames = await this.#decode(i, signal)
    if (this.#decodedBytes + frames.length <= this.#cacheBytes && !this.#decoded.has(i)) {
      this.#decodedBytes += frames.length
      this.#decoded.set(i, frames)
    }
    return frames
  }

  async #decode(i: number, signal?: AbortSignal): Promise<Uint8Array> {
    const { kind, path } = this.item(i)
    const { width, height, frames: wanted } = this.buckets[this.bucketOf(i)] as Bucket
    if (kind === 'image') return await loadImage(path, { width, height })
    const rate = this.fps === undefined ? {} : { fps: this.fps }
    const options = { width, height, maxFrames: wanted, ...rate, info: this.#infos?.[i], signal }
    const clip = await this.backend.decode(path, options)
    if (clip.count === wanted) return clip.frames
    if (this.short === 'reject') {
      this.#short.add(i)
      throw tooShort(path, clip.count, wanted)
    }
    const padded = new Uint8Array(wanted * width * height * 3)
    for (let at = 0; at < padded.length; at += clip.frames.length) {
      padded.set(clip.frames.subarray(0, Math.min(clip.frames.length, padded.length - at)), at)
    }
    return padded
  }

  /**
   * Leaves clip `i` out from now on, because loading it ended in `error`.
   *
   * @throws `error` when nothing may be left out or it says nothing of the clip (an abort); ERR_IO when it is one too many
   */
  reject(i: number, error: unknown): void {
    if (!(error instanceof PyraflowError) || error.code !== 'ERR_IO') throw error
    if (this.#rejected.has(i)) return
    const reason = this.#short.has(i) ? 'short' : 'unreadable'
    this.#bad.add({ reason, place: this.item(i).path, error })
    this.#rejected.add(i)
  }

  /** Whole batches in one epoch; the clips left over wait for another epoch's order. */
  batchCount(batchSize: number): number {
    return Math.floor(this.length / batchSize)
  }

  /** Positions of batch `index` of an epoch: a pure function of seed and epoch, which is all that resuming needs. */
  batchIndices(index: number, { batchSize, seed, epoch }: BatchOptions): number[] {
    const order = shuffle(this.length, orderSeed(seed, epoch))
    return Array.from(order.subarray(index * batchSize, (index + 1) * batchSize))
  }

  /**
   * Yields the decoded batches of one epoch or more, each in an order given by `seed` and `epoch`. The next batch is
   * decoded while the caller works on the present one. A clip that was left out is missing from its batch, whose others stay.
   *
   * @throws PyraflowError `ERR_OPTION` if `batchSize` does not fit the data set or there are several buckets; `ERR_IO` when
   *   nothing of a batch is left; else as {@link load}
   */
  async *batches(options: BatchOptions): AsyncGenerator<ClipBatch, void, undefined> {
    const { batchSize, skip = 0, epoch, epochs = 1, signal } = options
    const { width, height, frames: length } = this.options
    const perEpoch = Number.isInteger(batchSize) && batchSize > 0 ? this.batchCount(batchSize) : 0
    if (perEpoch === 0) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'batchSize',
        expected: `an integer from 1 to ${this.length} (clips in the data set)`,
        received: String(batchSize),
        remedy: 'lower batchSize or add clips',
      })
    }
    let order: { epoch: number; indices: Uint32Array } = { epoch: -1, indices: new Uint32Array(0) }
    const position = (k: number): number => {
      const batch = skip + Math.floor(k / batchSize)
      const now = epoch + Math.floor(batch / perEpoch)
      if (order.epoch !== now)
        order = { epoch: now, indices: shuffle(this.length, orderSeed(options.seed, now)) }
      return order.indices[(batch % perEpoch) * batchSize + (k % batchSize)] as number
    }
    const load = async (k: number, stop: AbortSignal): Promise<{ i: number; clip?: Uint8Array }> => {
      const i = position(k)
      if (this.#rejected.has(i)) return { i }
      try {
        return { i, clip: await this.load(i, stop) }
      } catch (error) {
        this.reject(i, error)
        return { i }
      }
    }
    const bytes = length * width * height * 3
    const count = Math.max(0, epochs * perEpoch - skip) * batchSize
    let [all, indices, frames] = [0, [] as number[], new Uint8Array(batchSize * bytes)]
    for await (const { i, clip } of ahead(count, load, { parallel: DECODERS, hold: batchSize, signal })) {
      if (clip) {
        frames.set(clip, indices.length * bytes)
        indices.push(i)
      }
      if (++all < batchSize) continue
      if (indices.length === 0) {
        const received = `none: ${this.item(i).path} and the others of the batch were left out`
        throw new PyraflowError('ERR_IO', { what: 'batch', expected: 'at least one clip', received })
      }
      yield {
        indices,
        text: indices.map((n) => this.item(n).text),
        frames: frames.subarray(0, indices.length * bytes),
      }
      ;[all, indices, frames] = [0, [], new Uint8Array(batchSize * bytes)]
    }
  }
}

const orderSeed = (seed: number, epoch: number): number => seed + epoch * 1_000_003

function bucketsOf({ buckets, ...rest }: DatasetOptions): readonly Bucket[] {
  const { width, height, frames } = rest as Bucket
  const all = buckets ?? [{ width, height, frames }]
  checkBuckets(all)
  return all.map((b) => ({ width: b.width, height: b.height, frames: b.frames }))
}

/**
 * Opens a data set (docs/data.md): `path` is a JSONL, a folder with `captions.jsonl` in it, or a folder of clips with a
 * text file beside each. A line is an object with `video` or `image` (relative to the JSONL) and `text`. Where there are
 * several buckets every file is asked for its size and length.
 *
 * @throws PyraflowError `ERR_IO` naming the entry that cannot be used, unless it may be left out (`onBad`), or when none can
 *   be; `ERR_OPTION` for bad sizes; `ERR_ABORTED`
 */
export async function openDataset(path: string, options: DatasetOptions & OpenOptions): Promise<Dataset> {
  const { signal, onProgress, limit, fps, short = 'reject' } = options
  const buckets = bucketsOf(options)
  const backend = options.backend ?? (await videoBackend())
  const bad = new BadItems(options.onBad, options.onBadItem)
  const items: DatasetItem[] = []
  const bucketOf: number[] = []
  const infos: (VideoInfo | undefined)[] = []
  const place = async ({ item, place, bad: known }: Listed): Promise<Placed> => {
    if (!item) return { bad: known }
    try {
      const info = buckets.length > 1 ? await clipInfo(item, backend, signal) : undefined
      const placed = placeItem(item, buckets, { fps, short }, info)
      return 'index' in placed ? { item, index: placed.index, info } : { bad: { place, ...placed } }
    } catch (error) {
      if (!(error instanceof PyraflowError) || error.code !== 'ERR_IO') throw error
      return { bad: { reason: 'unreadable', place, error } }
    }
  }
  const entries = await listDataset(path, limit)
  const one = async (i: number): Promise<Placed> => place(await entries.at(i))
  let done = 0
  const how = { parallel: DECODERS, hold: 2 * DECODERS, signal }
  for await (const placed of ahead(entries.length, one, how)) {
    throwIfAborted(signal, 'opening the data set')
    if (placed.bad) bad.add(placed.bad)
    else {
      items.push(placed.item)
      bucketOf.push(placed.index)
      infos.push(placed.info)
    }
    onProgress?.(++done, entries.length)
  }
  if (items.length === 0) {
    const received = `${bad.items.length} that were left out`
    throw new PyraflowError('ERR_IO', {
      what: `data set ${path}`,
      expected: 'an entry that can be used',
      received,
    })
  }
  return new Dataset(items, { ...options, backend }, { bucketOf: Int32Array.from(bucketOf), infos, bad })
}
