import { writeFileAtomically } from '../io/atomic.ts'
import { saveVideo } from '../io/image.ts'
import { type LatentClip, saveLatents } from './latents.ts'
import type { Recipe } from './recipe.ts'

export interface SaveVideoOptions {
  /** Also write `<path>.latents.safetensors`, from which the video can be continued without loss. */
  latents?: boolean | undefined
  signal?: AbortSignal | undefined
}

/** A finished video, with what it takes to make it again and to continue it. */
export class Video {
  /** u8 RGB [count, height, width, 3]. */
  readonly frames: Uint8Array
  readonly count: number
  readonly width: number
  readonly height: number
  readonly fps: number
  /** Normalised latents of all frames. */
  readonly latents: LatentClip
  readonly recipe: Recipe

  constructor(parts: Omit<Video, 'save'>) {
    this.frames = parts.frames
    this.count = parts.count
    this.width = parts.width
    this.height = parts.height
    this.fps = parts.fps
    this.latents = parts.latents
    this.recipe = parts.recipe
  }

  /**
   * Writes .mp4 or .webm (both need ffmpeg), .webp, .gif, .png (a folder of them for more than one frame), with the
   * recipe inside the file and in a JSON file beside it.
   * @throws ERR_OPTION for another ending; ERR_IO; ERR_ABORTED
   */
  async save(path: string, options: SaveVideoOptions = {}): Promise<void> {
    const { frames, width, height, fps, recipe } = this
    const { latents, signal } = options
    const metadata = { comment: JSON.stringify(recipe) }
    await saveVideo(path, frames, { width, height, fps, metadata, signal })
    if (latents) await saveLatents(`${path}.latents.safetensors`, this.latents, { recipe, signal })
    await writeFileAtomically(`${path}.json`, `${JSON.stringify(recipe, null, 2)}\n`)
  }
}
