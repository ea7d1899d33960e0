import { abortable } from '../engine/abortable.ts'
import { throwIfAborted } from '../engine/errors.ts'
import type { StageSteps } from '../flow/stages.ts'
import { PastKeys } from '../models/past-keys.ts'
import type { TransformerInputs, VelocityNetwork } from '../models/velocity-network.ts'
import { concat, slice } from '../ops/copy.ts'
import { euler } from '../ops/euler.ts'
import { currentTokens } from '../pyramid/current.ts'
import type { Layout } from '../pyramid/layout.ts'
import { keep } from '../tensor/scope.ts'
import { sliced } from '../tensor/sliced.ts'
import type { Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { TextFeatures } from '../text/encoder.ts'
import { FiniteCheck, nonFinite } from './finite.ts'
import { RepeatedStep } from './repeated-step.ts'

/** What sampling needs of a network; one that gives no `timeFeatures` is asked anew for every step. */
export type SampledNetwork = Pick<VelocityNetwork, 'latentChannels' | 'layoutSteps' | 'forwardSteps'> &
  Partial<Pick<VelocityNetwork, 'offload' | 'timeFeatures'>>

// Tokens of all rows. A step over more takes far longer than to queue it, and what a repeated one keeps in memory is no
// longer little.
const MOST_REPEATED = 4096

type Capture = TransformerInputs['capture']

export interface StageRunOptions extends StageSteps {
  readonly model: SampledNetwork
  readonly unit: number
  readonly stage: number
  /** How many steps of the stage came before these. */
  readonly first: number
  /** The latent that these steps begin with [B, C, f, h, w]; the run owns it. */
  readonly began: Tensor
  /** What the unit sees of the past, oldest first; the run owns them. */
  readonly clips: readonly Tensor[]
  /** B rows, or 2B under guidance (27). */
  readonly prompts: TextFeatures
  readonly guidance: number
  readonly guided: boolean
  /** Whether steps after the first repeat its ops instead of queueing their own. */
  readonly repeat: boolean
  /** Every how many steps text and history are computed; in between their keys and values are kept ones. */
  readonly historyCache: number
  readonly job: number
  readonly signal: AbortSignal | undefined
}

/** Euler steps of one unit in one stage, all guided or none. One is computed while the next is being queued. */
export class StageRun {
  readonly began: Tensor
  readonly #options: StageRunOptions
  readonly #clips: readonly Tensor[]
  readonly #layout: Layout
  readonly #past: PastKeys | undefined
  #latent: Tensor
  // Of steps that compute everything, and of those that compute the current clip alone.
  readonly #repeated: { all?: RepeatedStep; current?: RepeatedStep } = {}
  #released = false
  #running: { step: number; bad: Promise<string | undefined> } | undefined

  private constructor(
    options: StageRunOptions,
    clips: readonly Tensor[],
    layout: Layout,
    past: PastKeys | undefined,
  ) {
    this.began = options.began
    this.#latent = options.began
    this.#options = options
    this.#clips = clips
    this.#layout = layout
    this.#past = past
  }

  /** Queues what all steps share. */
  static *make(options: StageRunOptions): Steps<StageRun> {
    const { model, began, prompts, guided, historyCache } = options
    const clips = options.clips.map((clip) => keep(twice(clip, guided)))
    try {
      const { embeds: text, mask: textMask } = prompts
      const columns = [[...clips, twice(began, guided)]]
      const layout = yield* model.layoutSteps({ columns, text, textMask })
      // Without history there is little to keep, and text sees the first unit.
      const keeps = historyCache > 1 && clips.length > 0
      const past = keeps ? new PastKeys(layout, yield* currentTokens(layout)) : undefined
      return new StageRun(options, clips, layout, past)
    } catch (error) {
      for (const clip of [...clips, ...options.clips]) clip.dispose()
      throw error
    }
  }

  get steps(): number {
    return this.#options.timesteps.length
  }

  /** Queues step `n` and waits for the one before. @throws ERR_ABORTED; ERR_NUMERICS */
  async step(n: number): Promise<void> {
    throwIfAborted(this.#options.signal, 'generation')
    const before = this.#latent
    const check = new FiniteCheck()
    this.#latent = await this.#queue(before, n, check)
    if (before !== this.began) before.dispose()
    const bad = check.first()
    bad.catch(() => undefined)
    await this.#settle()
    this.#running = { step: n, bad }
  }

  /** The first step as work for `sliced`, unchecked; for plans. */
  firstStep(): Steps<Tensor> {
    return this.#step(this.#latent, 0, undefined)
  }

  /** Waits for the last step and gives its latent to the caller. @throws ERR_ABORTED; ERR_NUMERICS */
  async finish(): Promise<Tensor> {
    await this.#settle()
    const latent = this.#latent
    this.#latent = this.began
    return latent
  }

  *#step(x: Tensor, n: number, capture: Capture): Steps<Tensor> {
    return this.#euler(x, yield* this.#velocity(x, n, { capture }), n)
  }

  #times(n: number): number[] {
    return new Array<number>(this.#options.prompts.mask.length).fill(this.#options.timesteps[n] as number)
  }

  // Whether a step takes text and history as an earlier one left them.
  #reuses(n: number): boolean {
    return this.#past !== undefined && n % this.#options.historyCache !== 0
  }

  *#velocity(x: Tensor, n: number, more: { capture?: Capture; timeFeatures?: Tensor }): Steps<Tensor> {
    const { model, prompts, guided } = this.#options
    const [v] = (yield* model.forwardSteps({
      columns: [[...this.#clips, twice(x, guided)]],
      timesteps: this.#times(n),
      text: prompts.embeds,
      textMask: prompts.mask,
      pooled: prompts.pooled,
      layout: this.#layout,
      [this.#reuses(n) ? 'past' : 'keep']: this.#past,
      ...more,
    })) as [Tensor]
    return v
  }

  /** latent + Δς·v with v = v_uncond + g·(v_cond − v_uncond) (27), (28). */
  #euler(x: Tensor, v: Tensor, n: number): Tensor {
    const { sigmas, guidance, guided } = this.#options
    const deltaSigma = (sigmas[n + 1] as number) - (sigmas[n] as number)
    if (!guided) return euler(x, v, null, { deltaSigma, guidance: 1 })
    const batch = x.shape[0] as number
    return euler(x, slice(v, 0, batch, batch), slice(v, 0, 0, batch), { deltaSigma, guidance })
  }

  // A step whose network is noted, or repeated where that was done.
  *#repeatedStep(x: Tensor, n: number, phi: Float32Array): Steps<Tensor> {
    const kind = this.#reuses(n) ? 'current' : 'all'
    const repeated = this.#repeated[kind] ?? new RepeatedStep(x, phi)
    this.#repeated[kind] = repeated
    const { latent, timeFeatures } = repeated
    const v = yield* repeated.velocity(x, phi, () => this.#velocity(latent, n, { timeFeatures }))
    return this.#euler(x, v, n)
  }

  // φ(τ) of a step that may be a repeated one. Weights that can leave memory may not be where they were.
  #timeFeatures(n: number): Float32Array | undefined {
    const { repeat, model } = this.#options
    if (!repeat || !model.timeFeatures || this.steps === 1 || model.offload) return undefined
    const { textTokens, latentTokens } = this.#layout
    return textTokens + latentTokens <= MOST_REPEATED ? model.timeFeatures(this.#times(n)) : undefined
  }

  async #queue(x: Tensor, n: number, check: FiniteCheck, everything = false): Promise<Tensor> {
    const capture = (name: string, tensor: Tensor): void => check.add(name, tensor)
    const steps = (): Steps<Tensor> => this.#checked(x, n, check, everything ? capture : undefined)
    try {
      return await sliced(steps, { grad: false, job: this.#options.job })
    } catch (error) {
      check.dispose()
      throw error
    }
  }

  *#checked(x: Tensor, n: number, check: FiniteCheck, capture: Capture): Steps<Tensor> {
    const phi = capture ? undefined : this.#timeFeatures(n)
    const next = yield* phi ? this.#repeatedStep(x, n, phi) : this.#step(x, n, capture)
    check.add('the velocity', next)
    return next
  }

  // Reading one number of its result waits for a step, and says whether it came out well.
  async #settle(): Promise<void> {
    const running = this.#running
    this.#running = undefined
    if (!running) return
    const { job, signal } = this.#options
    if ((await abortable(running.bad, signal, job)) !== undefined) throw await this.#culprit(running.step)
  }

  // Which layer was the first whose output is not finite: these steps are run again, looking at everything.
  async #culprit(last: number): Promise<Error> {
    const { unit, stage, first, job, signal } = this.#options
    let x = this.began
    let layer: string | undefined
    let n = 0
    for (; n <= last; n++) {
      const check = new FiniteCheck()
      const next = await this.#queue(x, n, check, true)
      if (x !== this.began) x.dispose()
      x = next
      layer = await abortable(check.first(), signal, job)
      if (layer !== undefined) break
    }
    if (x !== this.began) x.dispose()
    return nonFinite(`unit ${unit}, stage ${stage}, step ${first + Math.min(n, last)}`, layer)
  }

  /** Frees everything but what the steps began with, and a latent that `finish` gave away. */
  release(): void {
    if (this.#released) return
    this.#released = true
    if (this.#latent !== this.began) this.#latent.dispose()
    for (const clip of [...this.#clips, ...this.#options.clips]) clip.dispose()
    for (const repeated of Object.values(this.#repeated)) repeated.dispose()
    this.#past?.dispose()
  }

  /** Frees everything but a latent that `finish` gave away. */
  dispose(): void {
    this.release()
    this.began.dispose()
  }
}

// Both halves of a guided batch see the same.
const twice = (x: Tensor, guided: boolean): Tensor => (guided ? concat([x, x], 0) : x.view(x.shape))
