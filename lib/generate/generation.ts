import { PyraflowError } from '../engine/errors.ts'
import { writeFileAtomically } from '../io/atomic.ts'
import { saveVideo } from '../io/image.ts'
import type { Recipe } from './options.ts'

export type GenerateEvent =
  | {
      type: 'progress'
      phase: 'denoise' | 'decode'
      unit: number
      stage: number
      done: number
      total: number
      etaMs: number
    }
  /** Decoded frames of one unit, u8 RGB [count, height, width, 3]; `first` counts from the video's first frame. */
  | { type: 'frames'; first: number; frames: Uint8Array; width: number; height: number; count: number }

export interface Video {
  /** u8 RGB [count, height, width, 3]. */
  frames: Uint8Array
  count: number
  width: number
  height: number
  fps: number
  recipe: Recipe
}

/** A generation under way: iterate it for progress and frames, or await `result()`. */
export class Generation implements AsyncIterable<GenerateEvent> {
  readonly #events: AsyncGenerator<GenerateEvent, Video>
  #video: Video | undefined

  constructor(events: AsyncGenerator<GenerateEvent, Video>) {
    this.#events = events
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<GenerateEvent> {
    try {
      for (;;) {
        const { value, done } = await this.#events.next()
        if (done) {
          this.#video ??= value
          return
        }
        yield value
      }
    } finally {
      // A reader that leaves early ends the generation, which frees what it holds.
      await this.#events.return(undefined as never)
    }
  }

  /** Runs to the end and returns the video. */
  async result(): Promise<Video> {
    if (!this.#video) for await (const _ of this) void _
    if (!this.#video) throw new PyraflowError('ERR_ABORTED', { what: 'generation ended without a result' })
    return this.#video
  }

  /** Runs to the end and writes .webp, .gif, .mp4 or a folder of .png, with the recipe in a JSON file beside it. */
  async save(path: string): Promise<Video> {
    const video = await this.result()
    const { frames, width, height, fps, recipe } = video
    await saveVideo(path, frames, { width, height, fps })
    await writeFileAtomically(`${path}.json`, `${JSON.stringify(recipe, null, 2)}\n`)
    return video
  }
}
