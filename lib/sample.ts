import { engine } from './engine/engine.ts'
import { PyraflowError } from './engine/errors.ts'
import { type GuidanceOptions, guidanceForUnit, guidedSteps } from './flow/guidance.ts'
import { type JumpCoefficients, jumpCoefficients } from './flow/jump.ts'
import { type StageSteps, type Stages, stageSteps } from './flow/stages.ts'
import { renoise } from './ops/renoise.ts'
import { noisePyramid } from './pyramid/latents.ts'
import { type Unit, unitsForFrames } from './pyramid/units.ts'
import { LatentHistory } from './sample/latent-history.ts'
import { PromptRows } from './sample/prompt-rows.ts'
import { type SampledNetwork, StageRun } from './sample/stage-run.ts'
import type { Generator } from './tensor/generator.ts'
import { keep, scope } from './tensor/scope.ts'
import { sliced } from './tensor/sliced.ts'
import type { Tensor } from './tensor/tensor.ts'
import type { TextFeatures } from './text/encoder.ts'

/** Where a generation's random numbers come from; recorded noise replays a run of another implementation. */
export interface NoiseSource {
  /** N(0, 1) latents of a unit at full resolution [B, C, f, H, W]; reduced to stage 0 by the sampler. */
  initial(unit: Unit, shape: readonly number[]): Tensor
  /** Block noise for one jump, or the seed and stream to draw it inside the kernel. */
  block(unit: Unit, stage: number, shape: readonly number[]): Tensor | { seed: bigint; stream: bigint }
}

/**
 * Counter-based noise: every draw has a stream of its own, named by unit, stage and purpose. A unit's noise so does not
 * depend on how long the video is, nor on where a generation began.
 */
export function seededNoise(generator: Generator): NoiseSource {
  return {
    initial: (unit, shape) => generator.stream('initial', unit.index).normal(shape),
    block: (unit, stage) => {
      const child = generator.stream('jump', unit.index, stage)
      return { seed: child.seed, stream: child.streamId }
    },
  }
}

export interface SampleOptions {
  stages: Stages
  /** Latent frames of the whole video: 1 + m·framesPerUnit. */
  frames: number
  /** Latent size at full resolution. */
  height: number
  width: number
  /** Prompt rows (B), for all units or unit by unit. */
  text: TextFeatures | ((unit: number) => TextFeatures)
  /** For guidance, B rows. */
  negative?: TextFeatures | undefined
  /** Euler steps per stage for the first unit and for later ones. */
  steps: readonly number[]
  videoSteps: readonly number[]
  guidance: GuidanceOptions
  /** The share of a unit's steps after which guidance ends, and with it the negative prompt's half of the work. Default 1. */
  guidanceStop?: number | undefined
  noise: NoiseSource
  /** Normalised latents [B, C, T, H, W] that the video begins with: an image, a clip, or units made earlier. */
  given?: Tensor | undefined
  framesPerUnit?: number
  /** Other coefficients of the jumps than the matched ones (spec/method.md §6), to measure what those are good for. */
  jump?: ((matched: JumpCoefficients) => JumpCoefficients) | undefined
  /** The whole video as one unit without history, for networks trained without the temporal pyramid (§11). */
  fullSequence?: boolean
  /**
   * Note the network's ops in the first step of a stage of few tokens, and only repeat them in the others; default. What
   * the network computes with then stays in memory from step to step, in more bytes than plans count.
   */
  repeat?: boolean
  /**
   * Compute text and history at every n-th step of a stage only, from its first on; in between the unit sees their keys and
   * values as they were, and costs no more than its own tokens. 1, the default: at every step. The network must be causal.
   */
  historyCache?: number
  /** Units of the past that a unit sees at most, beside the first frame (`planHistory`); default: all. */
  historyWindow?: number | undefined
  signal?: AbortSignal | undefined
}

export type SampleEvent =
  | { type: 'step'; unit: number; stage: number; step: number; done: number; total: number }
  /** What a stage began and ended with. Both are the sampler's own: read them before asking for the next event. */
  | { type: 'stage'; unit: number; stage: number; began: Tensor; latent: Tensor }
  /** Normalised latents [B, C, f, H, W] of a finished unit; the receiver owns them. */
  | { type: 'unit'; unit: number; latent: Tensor }

/**
 * Autoregressive pyramid sampling (spec/method.md §7, §8): unit by unit, stage by stage, step by step. Yields progress,
 * each stage's latent, and each unit when it is finished; given units are not yielded.
 * @throws ERR_ABORTED within one op of the signal; ERR_SHAPE and ERR_OPTION before anything is computed; ERR_NUMERICS
 * naming unit, stage, step and layer when the network's answer is not finite.
 */
export async function* sampleLatents(
  model: SampledNetwork,
  options: SampleOptions,
): AsyncGenerator<SampleEvent> {
  const { stages, given, negative, framesPerUnit = 1, repeat = true, historyCache = 1, signal } = options
  checkSizes(options)
  const units = unitsToMake(options)
  const total = units.reduce((n, unit) => n + sum(stepCounts(unit, options)), 0)

  const job = engine.newJob()
  const queued = <T>(fn: () => T): T => engine.within(job, fn)
  const history = new LatentHistory(stages.count, framesPerUnit, options.historyWindow)
  const rows = new PromptRows(negative)
  // Disposing twice is harmless, so this may name what has another owner meanwhile.
  let held: Tensor | undefined
  let done = 0
  try {
    if (given) queued(() => history.append(given))

    for (const unit of units) {
      const guidance = guidanceForUnit(unit.index, options.guidance)
      const guided = guidance > 0 && negative !== undefined
      const counts = stepCounts(unit, options)
      const guidedCounts = guidedSteps(counts, guided ? (options.guidanceStop ?? 1) : 0)
      let latent = queued(() => startNoise(unit, model.latentChannels, options))
      held = latent

      for (let stage = 0; stage < stages.count; stage++) {
        if (stage > 0) latent = queued(jump(latent, unit, stage, options))
        held = latent
        const all = stageSteps(stages, stage, counts[stage] as number)
        const runs: StageRun[] = []
        try {
          for (const { guided, first, ...part } of stageParts(all, guidedCounts[stage] as number)) {
            const prompts = queued(() => rows.of(textOf(unit.index, options), guided))
            const clips = queued(() => history.clips(unit.index, stage))
            const place = { unit: unit.index, stage, first, began: latent, clips, prompts, guidance, guided }
            // What a single step keeps nobody would take.
            const cache = part.timesteps.length > 1 ? historyCache : 1
            const stageOptions = { model, job, signal, repeat, historyCache: cache, ...place, ...part }
            const run = await sliced(() => StageRun.make(stageOptions), { grad: false, job })
            runs.push(run)
            for (let step = 0; step < run.steps; step++) {
              await run.step(step)
              done++
              yield { type: 'step', unit: unit.index, stage, step: first + step, done, total }
            }
            latent = await run.finish()
            held = latent
            // What the stage began with is still to be shown; nothing else should stand beside what comes next.
            run.release()
          }
          yield { type: 'stage', unit: unit.index, stage, began: (runs[0] as StageRun).began, latent }
        } finally {
          for (const run of runs) run.dispose()
        }
      }
      queued(() => history.append(latent))
      held = undefined
      yield { type: 'unit', unit: unit.index, latent }
    }
  } finally {
    // Nobody waits for what is still queued.
    if (signal?.aborted) await engine.cancel(job)
    held?.dispose()
    history.dispose()
    rows.dispose()
  }
}

/** A stage's steps under guidance, and then those without, unless there are none of them. */
function stageParts(
  { timesteps, sigmas }: StageSteps,
  guided: number,
): (StageSteps & { guided: boolean; first: number })[] {
  const part = (guided: boolean, first: number, end: number) => ({
    ...{ guided, first, timesteps: timesteps.subarray(first, end) },
    sigmas: sigmas.subarray(first, end + 1),
  })
  const parts = [part(true, 0, guided), part(false, guided, timesteps.length)]
  return parts.filter(({ timesteps }) => timesteps.length > 0)
}

function unitsToMake({ frames, framesPerUnit = 1, fullSequence, given }: SampleOptions): readonly Unit[] {
  if (fullSequence) {
    if (!given) return [{ index: 0, firstFrame: 0, frames, noiseFrame: 0, given: false }]
    throw new PyraflowError('ERR_OPTION', {
      what: 'given',
      expected: 'no given latents beside fullSequence: a network without history cannot go on from them',
      received: `${given.shape[2]} latent frames`,
    })
  }
  const before = given?.shape[2] ?? 0
  const units = unitsForFrames(frames, { framesPerUnit }).filter(({ firstFrame }) => firstFrame >= before)
  if (units[0]?.firstFrame === before) return units
  throw new PyraflowError('ERR_SHAPE', {
    what: 'given latents',
    expected: `whole units, fewer than the video's ${frames} latent frames`,
    received: `${before} latent frames`,
  })
}

const stepCounts = (unit: Unit, { steps, videoSteps }: SampleOptions): readonly number[] =>
  unit.index === 0 ? steps : videoSteps

function startNoise(unit: Unit, channels: number, options: SampleOptions): Tensor {
  const { stages, noise, height, width } = options
  const shape = [rowCount(options), channels, unit.frames, height, width]
  return keep(scope(() => noisePyramid(noise.initial(unit, shape), stages.count)[0] as Tensor))
}

/** α·Up2(latent) + β·n' (spec/method.md §6); frees the latent. */
const jump = (latent: Tensor, unit: Unit, stage: number, options: SampleOptions) => (): Tensor => {
  const matched = jumpCoefficients(options.stages, stage)
  const coefficients = options.jump?.(matched) ?? matched
  const [b, c, t, h, w] = latent.shape as [number, number, number, number, number]
  const next = scope(() => {
    const noise = options.noise.block(unit, stage, [b, c, t, 2 * h, 2 * w])
    return 'seed' in noise
      ? renoise(latent, { ...coefficients, ...noise })
      : renoise(latent, { ...coefficients, noise })
  })
  latent.dispose()
  return keep(next)
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0)

const textOf = (unit: number, { text }: SampleOptions): TextFeatures =>
  typeof text === 'function' ? text(unit) : text

const rowCount = (options: SampleOptions): number => options.given?.shape[0] ?? textOf(0, options).mask.length

function checkSizes(options: SampleOptions): void {
  const { stages, height, width, steps, videoSteps, guidanceStop = 1, negative } = options
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
  guidedSteps(steps, guidanceStop)
  for (const name of ['historyCache', 'historyWindow'] as const) {
    const n = options[name] ?? 1
    if (Number.isSafeInteger(n) && n >= 1) continue
    throw new PyraflowError('ERR_OPTION', { what: name, expected: 'a whole number from 1', received: `${n}` })
  }
  const batch = rowCount(options)
  if (negative && negative.mask.length !== batch) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'negative prompt',
      expected: `${batch} rows, one a prompt`,
      received: `${negative.mask.length}`,
    })
  }
}
