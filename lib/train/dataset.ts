import { readFile, stat } from 'node:fs/promises'
import { dirname, isAbsolute, join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { ioError } from '../io/atomic.ts'
import type { VideoBackend } from '../io/video.ts'
import { videoBackend } from '../io/webcodecs.ts'
import { shuffle } from '../tensor/shuffle.ts'

export { shuffle } from '../tensor/shuffle.ts'

export interface DatasetOptions {
  width: number
  height: number
  /** Frames per clip; a shorter clip is repeated from its start, a longer one is cut. */
  frames: number
  /** Resample clips to this rate (frames per second); default: as they are. */
  fps?: number
  /** Use only the first clips of the list. */
  limit?: number
  /** Keep decoded clips in memory up to this many bytes; default 0. */
  cacheBytes?: number
  /** Default: the ffmpeg program, else the optional npm decoder. */
  backend?: VideoBackend
}

export interface DatasetItem {
  /** Path of the clip that can be opened from here. */
  video: string
  text: string
  /** Whatever else the caption line held. */
  extra: Record<string, unknown>
}

export interface ClipBatch {
  /** Positions in the data set. */
  indices: number[]
  text: string[]
  /** u8 RGB, [batchSize, frames, height, width, 3]. */
  frames: Uint8Array
}

export interface BatchOptions {
  batchSize: number
  seed: number
  epoch: number
  /** Batches of this epoch that were already trained on; they are skipped without being decoded. */
  skip?: number
  signal?: AbortSignal | undefined
}

function lineError(place: string, received: string, cause?: unknown): PyraflowError {
  return new PyraflowError('ERR_IO', {
    what: `caption line ${place}`,
    expected: 'one JSON object such as {"video": "clip.mp4", "text": "a caption"}',
    received,
    remedy: 'correct or remove the line',
    cause,
  })
}

async function parseLine(line: string, place: string, folder: string): Promise<DatasetItem> {
  let value: unknown
  try {
    value = JSON.parse(line)
  } catch (error) {
    throw lineError(place, `text that is not JSON: ${line.slice(0, 60)}`, error)
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw lineError(place, `${line.slice(0, 60)}`)
  }
  const { video, text, ...extra } = value as Record<string, unknown>
  if (typeof video !== 'string' || video === '') throw lineError(place, 'no "video" path')
  if (typeof text !== 'string' || text.trim() === '') throw lineError(place, 'no or an empty "text"')
  const path = isAbsolute(video) ? video : join(folder, video)
  const info = await stat(path).catch(() => undefined)
  if (!info?.isFile()) throw lineError(place, `a clip that does not exist: ${path}`)
  return { video: path, text: text.trim(), extra }
}

/**
 * Clips and their captions. Opening checks every line; decoding happens item by item, outside this thread.
 */
export class Dataset {
  readonly options: Readonly<DatasetOptions>
  readonly #items: readonly DatasetItem[]
  readonly #backend: VideoBackend
  readonly #decoded = new Map<number, Uint8Array>()

  constructor(items: readonly DatasetItem[], options: DatasetOptions & { backend: VideoBackend }) {
    this.#items = items
    this.options = options
    this.#backend = options.backend
  }

  get length(): number {
    return this.#items.length
  }

  /** Clip path and caption at position `i`; throws `ERR_OPTION` outside [0, length). */
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

  /**
   * Decodes clip `i` to u8 RGB [frames, height, width, 3], exactly `options.frames` long.
   *
   * @throws PyraflowError `ERR_IO` naming the clip if it is unreadable, `ERR_ABORTED` after `signal`
   */
  async load(i: number, signal?: AbortSignal): Promise<Uint8Array> {
    const known = this.#decoded.get(i)
    if (known) return known
    const frames = await this.#decode(i, signal)
    const budget = this.options.cacheBytes ?? 0
    if ((this.#decoded.size + 1) * frames.length <= budget) this.#decoded.set(i, frames)
    return frames
  }

  async #decode(i: number, signal?: AbortSignal): Promise<Uint8Array> {
    const { width, height, frames: wanted, fps } = this.options
    const { video } = this.item(i)
    const clip = await this.#backend.decode(video, {
      width,
      height,
      maxFrames: wanted,
      ...(fps ? { fps } : {}),
      signal,
    })
    if (clip.count === wanted) return clip.frames
    const bytes = width * height * 3
    const padded = new Uint8Array(wanted * bytes)
    for (let at = 0; at < padded.length; at += clip.frames.length) {
      padded.set(clip.frames.subarray(0, Math.min(clip.frames.length, padded.length - at)), at)
    }
    return padded
  }

  /** Whole batches in one epoch; the clips left over wait for another epoch's order. */
  batchCount(batchSize: number): number {
    return Math.floor(this.length / batchSize)
  }

  /** Positions of batch `index` of an epoch: a pure function of seed and epoch, which is all that resuming needs. */
  batchIndices(index: number, { batchSize, seed, epoch }: BatchOptions): number[] {
    const order = shuffle(this.length, seed + epoch * 1_000_003)
    return Array.from(order.subarray(index * batchSize, (index + 1) * batchSize))
  }

  /**
   * Yields one epoch of decoded batches in an order given by `seed` and `epoch`. The next batch is decoded while the
   * caller works on the present one.
   *
   * @throws PyraflowError `ERR_OPTION` if `batchSize` does not fit the data set, else as `load`
   */
  async *batches(options: BatchOptions): AsyncGenerator<ClipBatch, void, undefined> {
    const { batchSize, skip = 0, signal } = options
    const count = Number.isInteger(batchSize) && batchSize > 0 ? this.batchCount(batchSize) : 0
    if (count === 0) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'batchSize',
        expected: `an integer from 1 to ${this.length} (clips in the data set)`,
        received: String(batchSize),
        remedy: 'lower batchSize or add clips',
      })
    }
    // Leaving the loop early must not leave a decoder running behind the caller's back.
    const stop = new AbortController()
    const any = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal
    const fetch = (index: number): Promise<ClipBatch> => {
      const promise = this.#loadBatch(this.batchIndices(index, options), any)
      promise.catch(() => {})
      return promise
    }
    try {
      let next = skip < count ? fetch(skip) : undefined
      for (let index = skip; next; ++index) {
        const batch = await next
        next = index + 1 < count ? fetch(index + 1) : undefined
        yield batch
      }
    } finally {
      stop.abort()
    }
  }

  async #loadBatch(indices: number[], signal: AbortSignal): Promise<ClipBatch> {
    const { width, height, frames: length } = this.options
    const bytes = length * width * height * 3
    const frames = new Uint8Array(indices.length * bytes)
    // Decoders are separate processes: a batch's clips are read side by side.
    await Promise.all(indices.map(async (i, k) => frames.set(await this.load(i, signal), k * bytes)))
    return { indices, text: indices.map((i) => this.item(i).text), frames }
  }
}

/**
 * Opens a folder of clips: `path` is the JSONL of captions, or a folder with `captions.jsonl` in it. Each line is an
 * object with `video` (relative to the JSONL) and `text`; blank lines are skipped.
 *
 * @throws PyraflowError `ERR_IO` naming file and line for a line that is not JSON, lacks a field or points to a
 *   missing clip; `ERR_OPTION` for bad sizes
 */
export async function openDataset(path: string, options: DatasetOptions): Promise<Dataset> {
  for (const name of ['width', 'height', 'frames'] as const) {
    if (Number.isInteger(options[name]) && options[name] > 0) continue
    throw new PyraflowError('ERR_OPTION', {
      what: `openDataset: ${name}`,
      expected: 'a positive integer',
      received: String(options[name]),
      remedy: `give another value for ${name}`,
    })
  }
  let file = path
  let content: string
  try {
    if ((await stat(path)).isDirectory()) file = join(path, 'captions.jsonl')
    content = await readFile(file, 'utf8')
  } catch (error) {
    throw ioError(error, 'reading captions', file)
  }
  const items: DatasetItem[] = []
  for (const [i, line] of content.split('\n').entries()) {
    if (items.length === options.limit) break
    if (line.trim() !== '') items.push(await parseLine(line, `${file}:${i + 1}`, dirname(file)))
  }
  if (items.length === 0) throw lineError(file, 'no caption lines at all')
  return new Dataset(items, { ...options, backend: options.backend ?? (await videoBackend()) })
}
