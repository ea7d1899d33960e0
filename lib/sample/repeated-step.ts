import { engine } from '../engine/engine.ts'
import { TIME_FEATURES } from '../nn/embed.ts'
import { copyInto } from '../ops/copy.ts'
import { keep } from '../tensor/scope.ts'
import type { Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'

/**
 * The network's share of the steps of a stage, which differ in the latent and the time alone: its ops are noted when they
 * are queued for the first step, and from then on one command repeats them all; a GPU launches them as one graph.
 */
export class RepeatedStep {
  /** What the ops read: the latent, and φ(τ). */
  readonly latent: Tensor
  readonly timeFeatures: Tensor
  #velocity: Tensor | undefined
  #recording: number | undefined

  /** Room for latents like `x` and times like φ(τ), [R·256]. */
  constructor(x: Tensor, phi: Float32Array) {
    this.latent = keep(Tensor.empty(x.shape, x.dtype))
    this.timeFeatures = keep(Tensor.empty([phi.length / TIME_FEATURES, TIME_FEATURES]))
  }

  /** The velocity at `x` and φ(τ), which `forward` queues the first time. It stays this object's. */
  *velocity(x: Tensor, phi: Float32Array, forward: () => Steps<Tensor>): Steps<Tensor> {
    copyInto(x, this.latent, 0, 0)
    this.timeFeatures.write(phi)
    if (this.#velocity && this.#recording !== undefined) {
      engine.replay(this.#recording)
      return this.#velocity
    }
    this.#recording = engine.beginRecording()
    try {
      this.#velocity = keep(yield* forward())
    } finally {
      engine.endRecording(this.#recording)
    }
    return this.#velocity
  }

  /** Queues the end of the memory. */
  dispose(): void {
    if (this.#recording !== undefined) engine.forget(this.#recording)
    for (const x of [this.latent, this.timeFeatures, this.#velocity]) x?.dispose()
  }
}
