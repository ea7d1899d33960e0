import { concat, slice } from '../ops/copy.ts'
import { keep, scope } from '../tensor/scope.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** Sees intermediate results, channels last [B, T, H, W, C]; they are freed afterwards, so copy what is to stay. */
export type Capture = (name: string, value: Tensor) => void

/**
 * One clip's way through a network, whole or in temporal chunks: where it begins, and the last input frames of every
 * causal convolution, with which the next chunk continues exactly where this one ends (spec/vae.md §6).
 */
export class Pass {
  /** Whether frames are carried to a next chunk. */
  readonly carry: boolean
  /** Whether a tape needs intermediate results later; without one they are freed as soon as they are used. */
  readonly recording: boolean
  readonly capture: Capture | undefined
  readonly #past = new Map<object, Tensor>()
  #initial = true

  constructor(options: { carry?: boolean; recording?: boolean; capture?: Capture | undefined } = {}) {
    this.carry = options.carry ?? false
    this.recording = options.recording ?? false
    this.capture = options.capture
  }

  /** Whether the chunk under way begins the clip. */
  get initial(): boolean {
    return this.#initial
  }

  /** Ends a chunk: the next one continues it. */
  endChunk(): void {
    this.#initial = false
  }

  /**
   * A convolution's input [B, T, H, W, C] after the frames of the chunk before, and how many zero frames still belong
   * in front of it; its own last frames are remembered under `owner`.
   */
  withPast(owner: object, x: Tensor, kernel: number, stride: number): { frames: Tensor; zeros: number } {
    const seenAgain = kernel - stride
    if (!this.carry || seenAgain <= 0) return { frames: x, zeros: kernel - 1 }
    const past = this.#past.get(owner)
    const frames = past ? concat([past, x], 1) : x
    const length = frames.shape[1] as number
    const count = Math.min(seenAgain, length)
    // A slice may share, and so hold, the whole chunk: concat copies it.
    const tail = scope(() => concat([slice(frames, 1, length - count, count)], 1))
    this.#past.set(owner, keep(tail))
    if (!past) return { frames, zeros: kernel - 1 }
    const zeros = seenAgain - (past.shape[1] as number)
    past.dispose()
    return { frames, zeros }
  }

  /** Runs a layer; what it makes on the way goes at once unless a tape needs it. */
  scoped(fn: () => Tensor): Tensor {
    return this.recording ? fn() : scope(fn)
  }

  /** Frees what nothing will ask for again. */
  free(...tensors: Tensor[]): void {
    if (!this.recording) for (const t of tensors) t.dispose()
  }

  /** Frees the carried frames; the next chunk would begin a clip. */
  dispose(): void {
    for (const t of this.#past.values()) t.dispose()
    this.#past.clear()
    this.#initial = true
  }
}
