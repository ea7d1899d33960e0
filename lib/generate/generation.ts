import { extname } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import type { SaveVideoOptions, Video } from './video.ts'

export type GenerateEvent =
  | {
      type: 'progress'
      phase: 'denoise'
      /** Index among the videos of this generation; 0 when there is one. */
      video: number
      unit: number
      stage: number
      step: number
      /** Steps of all videos. */
      done: number
      total: number
      /** Estimated time to the end, by the tokens of the steps that are left. */
      etaMs: number
    }
  /** With `previews`: what the unit will look like, u8 RGB [count, height, width, 3] at the stage's resolution. */
  | {
      type: 'preview'
      video: number
      unit: number
      stage: number
      frames: Uint8Array
      width: number
      height: number
      count: number
    }
  /** Decoded frames of one unit, u8 RGB [count, height, width, 3]; `first` counts from the video's first frame. */
  | {
      type: 'frames'
      video: number
      first: number
      frames: Uint8Array
      width: number
      height: number
      count: number
    }
  /** A video that is finished. */
  | { type: 'video'; video: number; result: Video }
  /** Something that was done otherwise than asked: a prompt cut, an image cropped, a recipe of another model. */
  | { type: 'warning'; message: string }

/** A generation under way: iterate it for progress and frames, or await its result. */
export class Generation implements AsyncIterable<GenerateEvent> {
  readonly #events: AsyncGenerator<GenerateEvent, Video[]>
  readonly #signal: AbortSignal | undefined
  #videos: Video[] | undefined

  constructor(events: AsyncGenerator<GenerateEvent, Video[]>, signal?: AbortSignal) {
    this.#events = events
    this.#signal = signal
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<GenerateEvent> {
    try {
      for (;;) {
        const { value, done } = await this.#events.next()
        if (done) {
          this.#videos ??= value
          return
        }
        yield value
      }
    } finally {
      // A reader that leaves early ends the generation, which frees what it holds.
      await this.#events.return(undefined as never)
    }
  }

  /** Runs to the end and returns every video: prompt by prompt, and for each prompt seed by seed. */
  async results(): Promise<Video[]> {
    if (!this.#videos) for await (const _ of this) void _
    if (!this.#videos) throw new PyraflowError('ERR_ABORTED', { what: 'generation ended without a result' })
    return this.#videos
  }

  /** Runs to the end and returns the video. @throws ERR_OPTION when there are several */
  async result(): Promise<Video> {
    const videos = await this.results()
    if (videos.length === 1) return videos[0] as Video
    throw new PyraflowError('ERR_OPTION', {
      what: 'result()',
      expected: 'one video',
      received: `${videos.length}`,
      remedy: 'Call results().',
    })
  }

  /**
   * Runs to the end and saves as {@link Video.save} does; of several videos number i goes to `name-i.ending`. Returns
   * the paths.
   */
  async save(path: string, options: SaveVideoOptions = {}): Promise<string[]> {
    const videos = await this.results()
    const ending = extname(path)
    const stem = path.slice(0, path.length - ending.length)
    const paths = videos.map((_, i) => (videos.length === 1 ? path : `${stem}-${i}${ending}`))
    for (const [i, video] of videos.entries()) {
      await video.save(paths[i] as string, { signal: this.#signal, ...options })
    }
    return paths
  }
}
