import { abortable } from './engine/abortable.ts'
import { engine } from './engine/engine.ts'
import { PyraflowError, throwIfAborted } from './engine/errors.ts'
import { type GuidanceOptions, guidanceForUnit } from './flow/guidance.ts'
import { jumpCoefficients } from './flow/jump.ts'
import { type Stages, stageSteps } from './flow/stages.ts'
import type { VelocityNetwork } from './models/velocity-network.ts'
import { concat, slice } from './ops/copy.ts'
import { euler } from './ops/euler.ts'
import { renoise } from './ops/renoise.ts'
import { planHistory } from './pyramid/history.ts'
import { historyClips, latentPyramid, noisePyramid } from './pyramid/latents.ts'
import { type Unit, unitsForFrames } from './pyramid/units.ts'
import type { Generator } from './tensor/generator.ts'
import { keep, scope } from './tensor/scope.ts'
import { sliced } from './tensor/sliced.ts'
import type { Tensor } from './tensor/tensor.ts'
import type { TextFeatures } from './text/encoder.ts'

/** Where a generation's random numbers come from; recorded noise replays a run of another implementation. */
export interface NoiseSource {
  /** N(0, 1) latents at full resolution [B, C, T, H, W]; reduced to stage 0 by the sampler. */
  initial(shape: readonly number[]): Tensor
  /** Block noise for one jump, or the seed and stream to draw it inside the kernel. */
  block(unit: number, stage: number, shape: readonly number[]): Tensor | { seed: bigint; stream: bigint }
}

/** Counter-based noise: every draw has a stream of its own, named by unit, stage and purpose. */
export function seededNoise(generator: Generator): NoiseSource {
  return {
    initial: (shape) => generator.stream('initial').normal(shape),
    block: (unit, stage) => {
      const child = generator.stream('jump', unit, stage)
      return { seed: child.seed, stream: child.streamId }
    },
  }
}

export interface SampleOptions {
  stages: Stages
  /** Latent frames asked for: `temp` of the reference. */
  frames: number
  /** Latent size at full resolution. */
  height: number
  width: number
  /** Prompt rows (B) and, for guidance, negative rows (B) before them. */
  text: TextFeatures
  negative?: TextFeatures | undefined
  /** Euler steps per stage for the first unit and for later ones. */
  steps: readonly number[]
  videoSteps: readonly number[]
  guidance: GuidanceOptions
  noise: NoiseSource
  /** Normalised latents [B, C, 1, H, W] of a given first frame: image-to-video. */
  firstFrame?: Tensor | undefined
  framesPerUnit?: number
  signal?: AbortSignal | undefined
}

export type SampleEvent =
  | { type: 'step'; unit: number; stage: number; step: number; done: number; total: number }
  /** `latent` is the sampler's own: read it before asking for the next event. */
  | { type: 'stage'; unit: number; stage: number; latent: Tensor }
  /** Normalised latents [B, C, f, H, W] of a finished unit; the receiver owns them. */
  | { type: 'unit'; unit: number; latent: Tensor }

/** All earlier frames at every pyramid level; grows by one unit at a time. */
class History {
  readonly #levels: (Tensor | null)[]

  constructor(count: number) {
    this.#levels = new Array<null>(count).fill(null)
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

  clips(unit: number, stage: number, framesPerUnit: number): Tensor[] {
    const levels = this.#levels.filter((level) => level !== null)
    return historyClips(levels, planHistory(unit, stage, this.#levels.length, framesPerUnit))
  }

  dispose(): void {
    this.#levels.forEach((t, k) => {
      t?.dispose()
      this.#levels[k] = null
    })
  }
}

const twice = (x: Tensor): Tensor => concat([x, x], 0)

/**
 * Autoregressive pyramid sampling (spec/method.md §7, §8): unit by unit, stage by stage, step by step. Yields progress,
 * each stage's latent, and each unit when it is finished. With a given first frame that frame is unit 0 and is not
 * yielded.
 * @throws ERR_ABORTED within one op of the signal; ERR_SHAPE and ERR_OPTION before anything is computed.
 */
export async function* sampleLatents(
  model: Pick<VelocityNetwork, 'latentChannels' | 'layout' | 'forwardSteps'>,
  options: SampleOptions,
): AsyncGenerator<SampleEvent> {
  const { stages, text, negative, framesPerUnit: f = 1, signal } = options
  const mode = options.firstFrame ? 'i2v' : 't2v'
  const units = unitsForFrames(options.frames, { framesPerUnit: f, mode }).filter((u) => !u.given)
  const batch = text.mask.length
  const channels = model.latentChannels
  const k = stages.count
  checkSizes(options, batch)
  const total = units.reduce(
    (n, u) => n + sum(u.index === 0 || mode === 'i2v' ? options.steps : options.videoSteps),
    0,
  )

  const job = engine.newJob()
  const queued = <T>(fn: () => T): T => engine.within(job, fn)
  const history = new History(k)
  const owned: Tensor[] = []
  let latent: Tensor | undefined
  let done = 0
  try {
    const prompts = queued(() => scope(() => bothHalves(text, negative)))
    owned.push(keep(prompts.embeds), keep(prompts.pooled))
    const { firstFrame } = options
    if (firstFrame) queued(() => history.append(firstFrame))
    const shape = [batch, channels, options.frames, options.height, options.width]
    const start = keep(queued(() => scope(() => noisePyramid(options.noise.initial(shape), k)[0] as Tensor)))
    owned.push(start)

    for (const unit of units) {
      const steps = unit.index === 0 || mode === 'i2v' ? options.steps : options.videoSteps
      const g = guidanceForUnit(unit.index, options.guidance)
      const guided = g > 0 && negative !== undefined
      latent = keep(queued(() => slice(start, 2, unit.noiseFrame, unit.frames)))
      for (let stage = 0; stage < k; stage++) {
        const before: Tensor = latent
        if (stage > 0)
          latent = replace(
            before,
            queued(() => jump(before, unit, stage, options)),
          )
        const clips = queued(() =>
          scope(() => history.clips(unit.index, stage, f).map((c) => (guided ? twice(c) : c))),
        )
        clips.forEach(keep)
        const cond = guided ? prompts : text
        const inputs = { text: cond.embeds, textMask: cond.mask, pooled: cond.pooled }
        const now: Tensor = latent
        const layout = queued(() =>
          scope(() => model.layout({ columns: [[...clips, guided ? twice(now) : now]], ...inputs })),
        )
        const { timesteps, sigmas } = stageSteps(stages, stage, steps[stage] as number)
        let running: Promise<void> | undefined
        try {
          for (let n = 0; n < timesteps.length; n++) {
            throwIfAborted(signal, 'generation')
            const x: Tensor = latent
            const next = await sliced(
              function* () {
                const [v] = (yield* model.forwardSteps({
                  columns: [[...clips, guided ? twice(x) : x]],
                  timesteps: new Array<number>(guided ? 2 * batch : batch).fill(timesteps[n] as number),
                  ...inputs,
                  layout,
                })) as [Tensor]
                const deltaSigma = (sigmas[n + 1] as number) - (sigmas[n] as number)
                return guided
                  ? euler(x, slice(v, 0, batch, batch), slice(v, 0, 0, batch), { deltaSigma, guidance: g })
                  : euler(x, v, null, { deltaSigma, guidance: 1 })
              },
              { grad: false, job },
            )
            latent = replace(latent, next)
            // One step is computed while the next is being queued.
            await (running ? abortable(running, signal, job) : undefined)
            running = engine.idle(job)
            running.catch(() => undefined)
            done++
            yield { type: 'step', unit: unit.index, stage, step: n, done, total }
          }
          if (running) await abortable(running, signal, job)
        } finally {
          for (const clip of clips) clip.dispose()
        }
        yield { type: 'stage', unit: unit.index, stage, latent }
      }
      const finished: Tensor = latent
      queued(() => history.append(finished))
      latent = undefined
      yield { type: 'unit', unit: unit.index, latent: finished }
    }
  } finally {
    // Nobody waits for what is still queued.
    if (signal?.aborted) await engine.cancel(job)
    latent?.dispose()
    history.dispose()
    for (const t of owned) t.dispose()
  }
}

function replace(before: Tensor, after: Tensor): Tensor {
  keep(after)
  before.dispose()
  return after
}

function bothHalves(text: TextFeatures, negative: TextFeatures | undefined): TextFeatures {
  if (!negative)
    return {
      ...text,
      embeds: text.embeds.view(text.embeds.shape),
      pooled: text.pooled.view(text.pooled.shape),
    }
  return {
    embeds: concat([negative.embeds, text.embeds], 0),
    mask: [...negative.mask, ...text.mask],
    pooled: concat([negative.pooled, text.pooled], 0),
  }
}

/** α·Up2(latent) + β·n' (spec/method.md §6). */
function jump(latent: Tensor, unit: Unit, stage: number, options: SampleOptions): Tensor {
  const coefficients = jumpCoefficients(options.stages, stage)
  const shape = [
    ...latent.shape.slice(0, 3),
    2 * (latent.shape[3] as number),
    2 * (latent.shape[4] as number),
  ]
  return scope(() => {
    const noise = options.noise.block(unit.index, stage, shape)
    return 'seed' in noise
      ? renoise(latent, { ...coefficients, ...noise })
      : renoise(latent, { ...coefficients, noise })
  })
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0)

function checkSizes(options: SampleOptions, batch: number): void {
  const { stages, height, width, steps, videoSteps, negative } = options
  const multiple = 2 ** stages.count
  if (height % multiple || width % multiple || height < multiple || width < multiple) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'latent size',
      expected: `height and width that are multiples of ${multiple} (the lowest of ${stages.count} stages is patched by 2)`,
      received: `${height} × ${width}`,
    })
  }
  for (const [what, list] of [
    ['steps', steps],
    ['videoSteps', videoSteps],
  ] as const) {
    if (list.length !== stages.count) {
      throw new PyraflowError('ERR_OPTION', {
        what,
        expected: `${stages.count} numbers, one a stage`,
        received: `[${list}]`,
      })
    }
  }
  if (negative && negative.mask.length !== batch) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'negative prompt',
      expected: `${batch} rows, one a prompt`,
      received: `${negative.mask.length}`,
    })
  }
}
