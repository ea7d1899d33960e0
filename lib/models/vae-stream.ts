import { PyraflowError } from '../engine/errors.ts'
import { scope } from '../tensor/scope.ts'
import { drain, type Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { VaeNetwork } from './vae-network.ts'
import { Pass } from './vae-pass.ts'
import { overTiles, overTime, runChunk, type TileGrid } from './vae-pieces.ts'
import { chunkLengths, type VaePlan } from './vae-plan.ts'

interface StreamRules {
  /** Throws when latents may not be decoded at all. */
  check(z: Tensor): void
  plan(shape: readonly number[], how: { initial: boolean; tile?: number | null | undefined }): VaePlan
  grid(tile: number): TileGrid
  /** Whether frames are carried from unit to unit; without it there is one unit. */
  readonly carry: boolean
}

/**
 * A clip being decoded unit by unit; holds every convolution's last frames between the units. Made by
 * `CausalVideoVAE.decodeStream`. After an error or an abandoned unit only `dispose` is left.
 */
export class DecodeStream {
  readonly #network: VaeNetwork
  readonly #rules: StreamRules
  readonly #passes: Pass[] = []
  #shape: readonly number[] | undefined
  #plan: VaePlan = { tile: null, window: null }
  #state: 'ready' | 'busy' | 'disposed' = 'ready'

  constructor(network: VaeNetwork, rules: StreamRules) {
    this.#network = network
    this.#rules = rules
  }

  /** In which pieces the last unit was decoded. */
  get pieces(): VaePlan {
    return this.#plan
  }

  /**
   * Frames [B, 3, n, 8h, 8w] of the clip's next latents [B, 16, t, h, w]: n = 8t, but 8t − 7 for the first ones.
   * @throws ERR_SHAPE when they do not continue the clip; ERR_OPTION; ERR_MEMORY when nothing fits the budget.
   */
  push(z: Tensor): Tensor {
    return scope(() => drain(this.pushSteps(z)))
  }

  /** `push` that pauses after every layer, for `sliced`; what it makes belongs to the surrounding scope. */
  *pushSteps(z: Tensor): Steps<Tensor> {
    if (this.#shape && !this.#rules.carry) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'a stream of frames',
        expected: 'one unit, as it was made for (single)',
        received: 'another one',
      })
    }
    if (this.#state !== 'ready') {
      throw new PyraflowError('ERR_OPTION', {
        what: 'a stream of frames',
        expected: 'one whose last unit was decoded to its end',
        received: this.#state === 'disposed' ? 'one that was disposed' : 'one in the middle of a unit',
        remedy: 'Begin the clip again with a new stream.',
      })
    }
    this.#rules.check(z)
    const lengths = this.#lengths(z)
    const { tile } = this.#plan
    const grid = tile === null ? null : this.#rules.grid(tile)
    this.#state = 'busy'
    const frames = yield* overTime(z, lengths, (chunk) =>
      overTiles(chunk, grid, (part, i) => runChunk(this.#network, part, this.#pass(i))),
    )
    // Disposed meanwhile: what was carried on since then is freed now.
    if ((this.#state as string) === 'disposed') this.dispose()
    else this.#state = 'ready'
    return frames
  }

  // Tiles stay what they were for the first unit; how many frames are decoded at once may differ from unit to unit.
  #lengths(z: Tensor): number[] {
    const { shape } = z
    const initial = this.#shape === undefined
    if (this.#shape && [0, 3, 4].some((i) => shape[i] !== this.#shape?.[i])) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'the next latents of a stream',
        expected: `batch and size of [${this.#shape}]`,
        received: `[${shape}]`,
      })
    }
    this.#plan = this.#rules.plan(shape, initial ? { initial } : { initial, tile: this.#plan.tile })
    this.#shape ??= shape
    return chunkLengths(shape[2] as number, this.#plan.window, initial)
  }

  #pass(index: number): Pass {
    let pass = this.#passes[index]
    if (!pass) {
      pass = new Pass({ carry: this.#rules.carry })
      this.#passes[index] = pass
    }
    return pass
  }

  /** Frees what is carried from unit to unit. */
  dispose(): void {
    this.#state = 'disposed'
    for (const pass of this.#passes) pass.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}
