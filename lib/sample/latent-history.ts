import { concat } from '../ops/copy.ts'
import { planHistory } from '../pyramid/history.ts'
import { historyClips, latentPyramid } from '../pyramid/latents.ts'
import { keep, scope } from '../tensor/scope.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** All earlier frames at every pyramid level; grows by one unit at a time. */
export class LatentHistory {
  readonly #levels: (Tensor | null)[]
  readonly #framesPerUnit: number

  constructor(stages: number, framesPerUnit: number) {
    this.#levels = new Array<null>(stages).fill(null)
    this.#framesPerUnit = framesPerUnit
  }

  append(latent: Tensor): void {
    const pyramid = scope(() => {
      const levels = latentPyramid(latent.view(latent.shape), this.#levels.length)
      return levels.map((level, k) => {
        const before = this.#levels[k]
        return before ? concat([before, level], 2) : level
      })
    })
    this.dispose()
    pyramid.forEach((t, k) => {
      this.#levels[k] = keep(t)
    })
  }

  /** What a unit sees of the past at a stage, oldest first (eq. 29). */
  clips(unit: number, stage: number): Tensor[] {
    const levels = this.#levels.filter((level) => level !== null)
    return historyClips(levels, planHistory(unit, stage, this.#levels.length, this.#framesPerUnit))
  }

  dispose(): void {
    this.#levels.forEach((t, k) => {
      t?.dispose()
      this.#levels[k] = null
    })
  }
}
