import { setImmediate } from 'node:timers/promises'
import { engine } from './engine/engine.ts'
import { PyraflowError } from './engine/errors.ts'
import { type Lap, Rehearsal } from './engine/rehearsal.ts'
import { denormaliseLatents } from './flow/normalise.ts'
import type { Recipe } from './generate/recipe.ts'
import { stageFlops, type UnitTokens, unitTokens } from './generate/tokens.ts'
import type { VaePlan } from './models/vae-plan.ts'
import { assumeOffload } from './nn/offload.ts'
import { cast } from './ops/cast.ts'
import { framesEncode } from './ops/frames.ts'
import type { Pipeline } from './pipeline.ts'
import type { Rates } from './plan-seconds.ts'
import { secondsOf } from './plan-seconds.ts'
import { LatentHistory } from './sample/latent-history.ts'
import { PromptRows } from './sample/prompt-rows.ts'
import { StageRun } from './sample/stage-run.ts'
import { keep } from './tensor/scope.ts'
import { sliced } from './tensor/sliced.ts'
import type { Steps } from './tensor/tape.ts'
import { Tensor } from './tensor/tensor.ts'
import type { TextFeatures } from './text/encoder.ts'

/** Bytes by phase. Phases follow each other: the process needs the weights and the largest of them. */
export interface PlannedBytes {
  /** What stays in memory from loading on. */
  readonly weights: { readonly transformer: number; readonly vae: number; readonly text: number }
  /** Most while prompts are encoded: text encoders that are not kept, and their work. */
  readonly text: number
  /** Most while the last unit, which has the longest history, is denoised. */
  readonly denoise: number
  /** Most while a unit is decoded, with everything that waits for the next one. */
  readonly decode: number
  /** Finished frames, and a unit's as they come. They are the program's, not the engine's. */
  readonly frames: number
  /** All weights, the largest phase and the frames. */
  readonly peak: number
  /** About what the system will show for the process: the peak, freed blocks kept for reuse, and Node.js itself. */
  readonly process: number
}

// The allocator's allowance (allocator.cc), and Node.js with the addon as they were measured.
const KEPT_BLOCKS = 2 ** 28
const NODE = 120 * 2 ** 20

/** What a generation is going to take; nothing was allocated to find out. */
export interface Plan {
  readonly width: number
  readonly height: number
  /** Of the video. */
  readonly frames: number
  readonly dtype: 'f32' | 'bf16'
  readonly quantize?: 'int8'
  /** Latent tokens of one network call, for each unit and stage. */
  readonly tokens: readonly UnitTokens[]
  /** Multiplications and additions, by phase. */
  readonly flops: {
    readonly text: number
    readonly denoise: number
    readonly decode: number
    readonly total: number
  }
  readonly bytes: PlannedBytes
  /** Bytes of weights that leave memory, because a limit wants it, and are read again for every step; else 0. */
  readonly offloaded: number
  /** Pieces that units are decoded in. */
  readonly pieces: VaePlan
  /** Rough times of this machine, where its rates were given. */
  readonly seconds?: {
    readonly text: number
    readonly denoise: number
    readonly decode: number
    readonly total: number
  }
}

interface Phases {
  readonly denoise: number
  readonly decode: number
  readonly firstFlops: number
  readonly laterFlops: number
  readonly pieces: VaePlan
}

/** Bytes of a network's weights as it keeps them. */
export function weightBytes(parameters: ReadonlyMap<string, Tensor>): number {
  let bytes = 0
  for (const tensor of parameters.values()) bytes += tensor.packed?.bytes ?? tensor.bytes
  return bytes
}

/** Bytes of everything that a pipeline keeps from loading on; `offload`: without the transformer's matrices. */
export function pipelineWeights(
  { transformer, vae, text }: Pipeline,
  offload: boolean,
): PlannedBytes['weights'] {
  const away = offload ? (transformer.offload?.bytes ?? 0) : 0
  return {
    transformer: weightBytes(transformer.parameters) + weightBytes(transformer.buffers) - away,
    vae: weightBytes(vae.parameters),
    text: text.memory?.(2).kept ?? 0,
  }
}

/** The budget of decoding: what the pipeline's own limit leaves beside its weights. */
export function decodeBudget(
  pipeline: Pipeline,
  recipe: Pick<Recipe, 'maxMemory'>,
  offload: boolean,
): number | undefined {
  if (recipe.maxMemory !== undefined || pipeline.maxMemory === undefined) return recipe.maxMemory
  const { transformer, vae, text } = pipelineWeights(pipeline, offload)
  return Math.max(1, pipeline.maxMemory - transformer - vae - text)
}

/**
 * The plan of one video. `Pipeline.plan` and `planFolder` call it. What does not fit the pipeline's limit is planned with
 * the transformer's matrices out of memory, where they can leave it.
 *
 * @throws ERR_MEMORY when even the smallest pieces of decoding are beyond the budget
 */
export async function planVideo(pipeline: Pipeline, recipe: Recipe, rates?: Rates): Promise<Plan> {
  const { maxMemory, transformer } = pipeline
  const plan = (offload: boolean): Promise<Plan> => planOnce(pipeline, recipe, { offload, rates })
  if (maxMemory === undefined || !transformer.offload) return plan(false)
  const stays = await unlessTooLarge(plan(false))
  return stays && stays.bytes.peak <= maxMemory ? stays : plan(true)
}

async function planOnce(
  pipeline: Pipeline,
  recipe: Recipe,
  { offload, rates }: { offload: boolean; rates: Rates | undefined },
): Promise<Plan> {
  const { width, height, frames, dtype, quantize } = recipe
  const tokens = unitTokens(pipeline, recipe)
  const prompts =
    new Set([recipe.prompt, ...(recipe.promptChanges ?? []).map(({ prompt }) => prompt)]).size + 1
  const text = pipeline.text.memory?.(prompts) ?? { kept: 0, peak: 0, flops: 0 }
  const weights = pipelineWeights(pipeline, offload)
  const last = tokens.at(-1) as UnitTokens
  // Of the last unit: where guidance ends, an earlier stage's calls may be larger.
  const widest = tokens.filter(({ unit }) => unit === last.unit).reduce((a, b) => (b.total > a.total ? b : a))
  const phases = await rehearsePhases(pipeline, recipe, { prompts, last: widest, offload })
  const denoise = tokens.map((t) => stageFlops(pipeline, t))
  const linear = denoise.reduce((n, stage) => n + stage.linear, 0)
  const attention = denoise.reduce((n, stage) => n + stage.attention, 0)
  const units = last.unit
  const decode = phases.firstFlops + units * phases.laterFlops
  const unit = pipeline.vae.temporalFactor * (pipeline.config.framesPerUnit ?? 1)
  const finished = (frames + unit) * width * height * 3
  const kept = weights.transformer + weights.vae + weights.text
  const largest = Math.max(text.peak, phases.denoise, phases.decode)
  const peak = kept + largest + finished
  const offloaded = offload ? (pipeline.transformer.offload?.bytes ?? 0) : 0
  const read = offloaded * tokens.reduce((n, { steps }) => n + steps, 0)
  return {
    ...{ width, height, frames, dtype, ...(quantize && { quantize }), tokens },
    flops: {
      text: text.flops,
      denoise: linear + attention,
      decode,
      total: text.flops + linear + attention + decode,
    },
    bytes: {
      ...{ weights, text: text.peak, denoise: phases.denoise, decode: phases.decode, frames: finished },
      peak,
      process: peak + Math.min(largest, KEPT_BLOCKS) + NODE,
    },
    offloaded,
    pieces: phases.pieces,
    ...(rates && { seconds: secondsOf({ text: text.flops, linear, attention, decode, read }, rates) }),
  }
}

// The whole of a generation with its middle left out: the first unit's frames, another's, the last unit's largest stage
// and its frames, in the order and with the tensors that `generateVideos` has. Nothing is computed.
async function rehearsePhases(
  pipeline: Pipeline,
  recipe: Recipe,
  { prompts, last, offload }: { prompts: number; last: UnitTokens; offload: boolean },
): Promise<Phases> {
  const { transformer, vae, text, config, dtype, stages } = pipeline
  const f = config.framesPerUnit ?? 1
  const [h, w] = [recipe.height / vae.spatialFactor, recipe.width / vae.spatialFactor]
  const channels = transformer.latentChannels
  const rehearsal = new Rehearsal(engine)
  const { lap } = rehearsal
  const within = <T>(fn: () => T): T => rehearsal.within(() => assumeOffload(offload, fn))
  const made: { dispose(): void }[] = []
  const own = <T extends { dispose(): void }>(x: T): T => {
    made.push(x)
    return x
  }
  const tensor = (shape: readonly number[], type: 'f32' | 'bf16' = 'f32'): Tensor =>
    own(keep(Tensor.empty(shape, type)))
  const textType = text.memory ? dtype : 'f32'
  const features = (): TextFeatures => ({
    embeds: tensor([1, text.maxLength, text.jointDim], textType),
    mask: [new Array<number>(text.maxLength).fill(1)],
    pooled: tensor([1, text.pooledDim], textType),
  })
  const latentOf = (frames: number): Tensor => tensor([1, channels, frames, h, w])
  const stream = vae.decodeStream({
    maxMemory: decodeBudget(pipeline, recipe, offload),
    single: last.unit === 0,
  })
  const history = new LatentHistory(stages.count, f, recipe.historyWindow)
  const decode = async (latent: Tensor, begins: boolean): Promise<Lap> => {
    const steps = function* (): Steps<Tensor> {
      const z = cast(denormaliseLatents(latent, config.normalisation, begins), dtype)
      return framesEncode(yield* stream.pushSteps(z))
    }
    const bytes = await sliced(steps, { grad: false, within })
    within(() => bytes.dispose())
    return lap()
  }
  const append = (unit: number): Tensor =>
    within(() => {
      const latent = latentOf(unit === 0 ? 1 : f)
      history.append(latent)
      return latent
    })
  try {
    const both = within(() => {
      own(stream)
      own(history)
      const each = Array.from({ length: prompts }, features)
      return own(new PromptRows(each[0])).of(each[1] as TextFeatures, last.sequences > 1)
    })
    let first: Lap | undefined
    let later: Lap | undefined
    for (let unit = 0; unit < last.unit; unit++) {
      const latent = append(unit)
      if (unit === 0) first = await decode(latent, true)
      // From the second on every unit is decoded alike.
      if (unit === 1) later = await decode(latent, false)
    }
    lap()
    const scale = 2 ** (stages.count - 1 - last.stage)
    const options = within(() => ({
      ...{ model: transformer, prompts: both, guidance: 1, guided: last.sequences > 1, first: 0, job: 0 },
      ...{ unit: last.unit, stage: last.stage, clips: history.clips(last.unit, last.stage) },
      ...{ timesteps: Float64Array.of(1), sigmas: Float64Array.of(1, 0), signal: undefined },
      repeat: false,
      historyCache: last.kept > 0 ? (recipe.historyCache ?? 1) : 1,
      began: keep(Tensor.empty([1, channels, last.unit === 0 ? 1 : f, h / scale, w / scale])),
    }))
    const run = own(await sliced(() => StageRun.make(options), { grad: false, within }))
    await setImmediate()
    const after = await sliced(() => run.firstStep(), { grad: false, within })
    const step = lap()
    within(() => {
      run.dispose()
      after.dispose()
    })
    const latent = within(() => tensor([1, channels, last.unit === 0 ? 1 : f, h, w]))
    lap()
    const frames = await decode(latent, last.unit === 0)
    first ??= frames
    later ??= frames
    return {
      denoise: step.peak,
      decode: Math.max(first.peak, later.peak, frames.peak),
      firstFlops: first.flops,
      laterFlops: later.flops,
      pieces: stream.pieces,
    }
  } finally {
    within(() => {
      for (const x of made) x.dispose()
    })
  }
}

/**
 * The plan of a video that fits the pipeline's limit; undefined where there is none.
 *
 * @throws ERR_MEMORY naming the largest setting that fits, when this one does not
 */
export async function planWithinLimit(pipeline: Pipeline, recipe: Recipe): Promise<Plan | undefined> {
  const { maxMemory } = pipeline
  if (maxMemory === undefined) return undefined
  const plan = await unlessTooLarge(planVideo(pipeline, recipe))
  if (plan && plan.bytes.peak <= maxMemory) return plan
  const fits = await largestThatFits(pipeline, recipe)
  throw new PyraflowError('ERR_MEMORY', {
    what: `a video of ${recipe.width}×${recipe.height} with ${recipe.frames} frames`,
    expected: `to fit in maxMemory, ${gib(maxMemory)}`,
    received: plan ? `a need of ${gib(plan.bytes.peak)}` : 'more than that in the smallest pieces',
    remedy: fits
      ? `The largest that fits is ${fits.width}×${fits.height} with ${fits.frames} frames.`
      : 'Nothing of this model fits: allow more memory or use bf16.',
  })
}

/** Bytes as people read them. */
export const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`

/** Undefined when not even the smallest pieces of decoding fit. */
async function unlessTooLarge(plan: Promise<Plan>): Promise<Plan | undefined> {
  try {
    return await plan
  } catch (error) {
    if (error instanceof PyraflowError && error.code === 'ERR_MEMORY') return undefined
    throw error
  }
}

// As many frames as fit of the size asked for, else of the next smaller one that the model knows.
async function largestThatFits(pipeline: Pipeline, recipe: Recipe): Promise<Recipe | undefined> {
  const area = (size: readonly number[]): number => (size[0] as number) * (size[1] as number)
  const asked: [number, number] = [recipe.width, recipe.height]
  const smaller = (pipeline.config.sizes ?? []).filter((size) => area(size) < area(asked))
  const step = pipeline.vae.temporalFactor * (pipeline.config.framesPerUnit ?? 1)
  for (const [width, height] of [asked, ...smaller.sort((a, b) => area(b) - area(a))]) {
    const sized = { ...recipe, width, height }
    const fits = async (units: number): Promise<boolean> => {
      const plan = await unlessTooLarge(planVideo(pipeline, { ...sized, frames: 1 + units * step }))
      return plan !== undefined && plan.bytes.peak <= (pipeline.maxMemory as number)
    }
    if (!(await fits(0))) continue
    let [low, high] = [0, Math.ceil((recipe.frames - 1) / step) + 1]
    while (high - low > 1) {
      const middle = (low + high) >> 1
      if (await fits(middle)) low = middle
      else high = middle
    }
    return { ...sized, frames: 1 + low * step }
  }
  return undefined
}
