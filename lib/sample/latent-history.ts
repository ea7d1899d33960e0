import { concat } from '../ops/copy.ts'
import { planHistory } from '../pyramid/history.ts'
import { historyClips, latentPyramid } from '../pyramid/latents.ts'
import { keep, scope } from '../tensor/scope.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** All earlier frames at every pyramid level; grows by one unit at a time. */
export class LatentHistory {
  readonly #levels: (Tensor | null)[]
  readonly #framesPerUnit: number
  readonly #window: number | undefined

  /** `window`: units that are seen at most, beside the first frame. */
  constructor(stages: number, framesPerUnit: number, window?: number) {
    this.#levels = new Array<null>(stages).fill(null)
    this.#framesPerUnit = framesPerUnit
    this.#window = window
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
    const count = this.#levels.length
    return historyClips(levels, planHistory(unit, stage, count, this.#framesPerUnit, this.#window))
  }

  dispose(): void {
    this.#levels.forEach((t, k) => {
      t?.dispose()
      this.#levels[k] = null
    })
  }
}
