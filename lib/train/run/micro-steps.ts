import { sliced } from '../../tensor/sliced.ts'
import { backwardSteps } from '../../tensor/tape.ts'
import { Tensor } from '../../tensor/tensor.ts'
import type { RunOptions } from './settings.ts'

/** What a forward pass gives: the loss and numbers to report beside it, all of one element. */
export interface StepLoss {
  loss: Tensor
  metrics?: Record<string, Tensor>
}

/** Numbers of a step whose gradients are complete but not yet used. */
export interface StepNumbers {
  /** Means over the micro-steps. */
  readonly loss: number
  readonly metrics: Readonly<Record<string, number>>
  readonly gradNorm: number
  /** What {@link AdamW.step} clips by; whoever takes it disposes it. */
  readonly clip: Tensor
}

interface Queued extends StepLoss {
  clip?: Tensor
}

/** Prepares micro-steps one ahead of the one that computes, across the ends of steps. */
export class MicroSteps {
  readonly #o: RunOptions
  readonly #count: number
  readonly #job: number
  #prepared: Promise<unknown> | undefined

  /** Begins to prepare the first micro-step of step `first`. What it queues belongs to `job`. */
  constructor(options: RunOptions, job: number, first: number) {
    this.#o = options
    this.#count = options.accumulate ?? 1
    this.#job = job
    this.#prepare(first, 0)
  }

  #prepare(step: number, micro: number): void {
    this.#prepared = step < this.#o.steps ? this.#o.prepare(step, micro) : undefined
    // Whoever waits for it hears of the failure; until then nobody does.
    this.#prepared?.catch(() => undefined)
  }

  /**
   * Averages the gradients of a step's micro-steps. Undefined when the signal fired first: they are incomplete then.
   */
  async run(step: number): Promise<StepNumbers | undefined> {
    const { signal } = this.#o
    const queued: Queued[] = []
    const losses: Promise<Record<string, number>>[] = []
    try {
      for (let micro = 0; micro < this.#count; micro++) {
        // An abort may also end the preparation early.
        const input = signal?.aborted
          ? undefined
          : await this.#prepared?.catch((error: unknown) => {
              if (!signal?.aborted) throw error
            })
        if (signal?.aborted) return undefined
        queued.push(await this.#queue(step, micro, input))
        if (micro + 1 < this.#count) this.#prepare(step, micro + 1)
        else this.#prepare(step + 1, 0)
        losses.push(read(queued[micro] as Queued))
        losses[micro]?.catch(() => undefined)
        // While one micro-step computes the next is queued, but no more than that: an abort would wait for them all.
        if (micro > 0) await losses[micro - 1]
      }
      const clip = (queued.at(-1) as Queued).clip as Tensor
      const values = await Promise.all(losses)
      const [gradNorm] = (await clip.floats()) as unknown as [number]
      const { loss, ...metrics } = means(values) as { loss: number }
      ;(queued.at(-1) as Queued).clip = undefined
      return { loss, metrics, gradNorm, clip }
    } finally {
      for (const { loss, metrics, clip } of queued)
        for (const t of [loss, clip, ...Object.values(metrics ?? {})]) t?.dispose()
    }
  }

  async #queue(step: number, micro: number, input: unknown): Promise<Queued> {
    const [o, count] = [this.#o, this.#count]
    return await sliced(
      function* () {
        const { loss, metrics = {} } = yield* o.forward(step, input as never, micro)
        // Weighing the loss weighs all gradients, so that their sum is the mean without another pass over them.
        const share = count > 1 ? Tensor.full(loss.shape, 1 / count, loss.dtype) : undefined
        yield* backwardSteps(loss, share)
        return { loss, metrics, ...(micro + 1 === count ? { clip: o.optimizer.gradNorm() } : {}) }
      },
      { job: this.#job },
    )
  }
}

async function read({ loss, metrics = {} }: StepLoss): Promise<Record<string, number>> {
  const entries = Object.entries({ ...metrics, loss })
  const values = await Promise.all(entries.map(([, t]) => t.item()))
  return Object.fromEntries(entries.map(([name], i) => [name, values[i] as number]))
}

/** Means by name; a number that only some micro-steps have is averaged over those. */
function means(all: readonly Record<string, number>[]): Record<string, number> {
  const names = new Set(all.flatMap((values) => Object.keys(values)))
  return Object.fromEntries(
    Array.from(names, (name) => {
      const given = all.flatMap((values) => values[name] ?? [])
      return [name, given.reduce((a, b) => a + b) / given.length]
    }),
  )
}
