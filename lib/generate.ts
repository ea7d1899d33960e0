import { engine } from './engine/engine.ts'
import { PyraflowError } from './engine/errors.ts'
import { networkOf } from './generate/adapters.ts'
import { denoise, latentsOf, stepCosts } from './generate/denoise.ts'
import type { GenerateEvent } from './generate/generation.ts'
import { type Given, givenLatents, streamOf } from './generate/given.ts'
import { KeptUnits } from './generate/kept-units.ts'
import { decodeFrames, toClip } from './generate/latents.ts'
import { preview } from './generate/preview.ts'
import type { Recipe } from './generate/recipe.ts'
import { checkLength, type Request } from './generate/resolve.ts'
import { PromptFeatures } from './generate/texts.ts'
import { Video } from './generate/video.ts'
import type { DecodeStream } from './models/vae-stream.ts'
import type { VelocityNetwork } from './models/velocity-network.ts'
import { slice } from './ops/copy.ts'
import type { Pipeline } from './pipeline.ts'
import { decodeBudget, gib, planWithinLimit } from './plan.ts'
import { pixelFrames, unitsForFrames } from './pyramid/units.ts'
import { keep, scope } from './tensor/scope.ts'
import type { Tensor } from './tensor/tensor.ts'

interface Run {
  readonly pipeline: Pipeline
  readonly signal: AbortSignal | undefined
  readonly previews: boolean
  /** Folder of finished units. */
  readonly resume: string | undefined
  readonly job: number
  readonly network: VelocityNetwork
  readonly features: PromptFeatures
  readonly progress: Progress
  /** Whether the transformer's matrices are out of memory. */
  readonly offload: boolean
  /** Warnings that have not been told yet. */
  readonly warnings: string[]
}

/** Prompts → videos, one after another: text features first, then for each video its units, and each unit's frames. */
export async function* generateVideos(
  pipeline: Pipeline,
  requests: readonly Request[],
  options: Pick<Run, 'signal' | 'previews' | 'resume'>,
): AsyncGenerator<GenerateEvent, Video[]> {
  const { signal } = options
  const warnings: string[] = []
  const plan = await planWithinLimit(pipeline, (requests[0] as Request).recipe)
  const recipes = requests.map(({ recipe }) => recipe)
  const [first] = requests as [Request]
  const place = { model: await pipeline.modelHash(), backend: engine.device.backend }
  warnings.push(
    ...differences(first, { ...place, dtype: pipeline.dtype, quantize: pipeline.quantize ?? 'none' }),
  )
  const onWarning = (message: string): unknown => warnings.push(message)
  // All videos of a batch have the same.
  const { network, facts, dispose } = await networkOf(pipeline, first.recipe, { signal, onWarning })
  let features: PromptFeatures | undefined
  let comeBack: (() => void) | undefined
  const videos: Video[] = []
  try {
    if (plan?.offloaded) {
      comeBack = pipeline.transformer.offload?.begin()
      warnings.push(`To fit in maxMemory, ${gib(plan.offloaded)} of weights are read again for every step.`)
    } else await pipeline.transformer.offload?.restore(signal)
    features = await PromptFeatures.of(pipeline, recipes, { signal, onWarning })
    const progress = new Progress(requests.length)
    const offload = comeBack !== undefined
    const work = { network, features, progress, warnings, offload }
    const run: Run = { pipeline, ...options, job: engine.newJob(), ...work }
    for (const [video, request] of requests.entries()) {
      const result = yield* generateVideo(run, request, video, { ...place, ...facts })
      videos.push(result)
      yield { type: 'video', video, result }
    }
    return videos
  } finally {
    comeBack?.()
    dispose()
    features?.dispose()
    await engine.idle().catch(() => undefined)
  }
}

async function* generateVideo(
  run: Run,
  request: Request,
  video: number,
  place: Pick<Recipe, 'model' | 'backend' | 'adapters'>,
): AsyncGenerator<GenerateEvent, Video> {
  const { pipeline, signal, job, progress, warnings } = run
  const { width, height } = request.recipe
  const where = { signal, job }
  const units: Tensor[] = []
  let decoder: DecodeStream | undefined
  let given: Given | undefined
  let known: Tensor | undefined
  let whole = new Uint8Array()
  let count = 0
  const finished = async (recipe: Recipe): Promise<Video> => {
    const latents = await toClip(units)
    return new Video({ frames: whole, count, width, height, fps: recipe.fps, latents, recipe })
  }
  const show = async (latent: Tensor, what: string): Promise<GenerateEvent> => {
    const first = count
    const decode = (z: Tensor) => (decoder as DecodeStream).pushSteps(z)
    const frames = await decodeFrames(pipeline, latent, { ...where, what, begins: first === 0, decode })
    whole.set(frames, first * width * height * 3)
    count += frames.length / (width * height * 3)
    return { type: 'frames', video, first, frames, width, height, count: count - first }
  }
  try {
    const onWarning = (message: string): unknown => warnings.push(message)
    given = await givenLatents(pipeline, request, { ...where, onWarning })
    const recipe = finishRecipe(pipeline, request, { ...given.facts, ...place }, given.latents)
    const total = latentsOf(pipeline, recipe, given.latents)
    const kept = run.resume === undefined ? undefined : new KeptUnits(run.resume, video, recipe)
    known = (await kept?.read(onWarning)) ?? given.latents?.view(given.latents.shape)
    const parts = partsOf(pipeline, known, { given: given.latents, total })
    for (const message of warnings.splice(0)) yield { type: 'warning', message }
    decoder = pipeline.vae.decodeStream({
      maxMemory: decodeBudget(pipeline, recipe, run.offload),
      single: total === 1,
    })
    // Filled unit by unit: copying all of a long video at once would hold up the event loop.
    whole = new Uint8Array(pixelFrames(total) * width * height * 3)
    for (const part of parts) {
      const latent = keep(scope(() => slice(known as Tensor, 2, part.first, part.frames)))
      units.push(latent)
      yield await show(latent, part.what)
    }

    const there = known?.shape[2] ?? 0
    const costs = (frames: number) => stepCosts(pipeline, recipe, { frames: total, given: frames })
    progress.begin(costs(given.latents?.shape[2] ?? 0), costs(there).length)
    if (there === total) return await finished(recipe)
    const generator = streamOf(recipe)
    const { network, features } = run
    const work = { network, recipe, features, generator, frames: total, given: known, signal }
    for await (const event of denoise(pipeline, work)) {
      const { unit } = event
      if (event.type === 'unit') {
        units.push(event.latent)
        // A full disk costs the safety, not the video.
        await kept?.write(units).catch((error: Error) => {
          warnings.push(`Finished units could not be kept: ${error.message}`)
        })
        for (const message of warnings.splice(0)) yield { type: 'warning', message }
        yield await show(event.latent, `decoding unit ${unit}`)
      } else if (event.type === 'step') {
        const { stage, step } = event
        yield { type: 'progress', phase: 'denoise', video, unit, stage, step, ...progress.step() }
      } else if (run.previews && event.stage < pipeline.stages.count - 1) {
        const { stage } = event
        const what = `preview of unit ${unit}, stage ${stage}`
        const small = await preview(pipeline, event, { ...where, what, begins: unit === 0 })
        yield { type: 'preview', video, unit, stage, ...small }
      }
    }
    return await finished(recipe)
  } finally {
    decoder?.dispose()
    given?.latents?.dispose()
    known?.dispose()
    for (const latent of units) latent.dispose()
  }
}

/**
 * What is there of a video, in the pieces in which it is decoded: what was given, which is one, and the units after it.
 *
 * @throws ERR_CHECKPOINT when kept latents are none of this video's
 */
function partsOf(
  pipeline: Pipeline,
  known: Tensor | undefined,
  { given, total }: { given: Tensor | undefined; total: number },
): { first: number; frames: number; what: string }[] {
  if (!known) return []
  const begun = given?.shape[2] ?? 0
  const there = known.shape[2] as number
  const { framesPerUnit = 1 } = pipeline.config
  const units = unitsForFrames(total, { framesPerUnit })
  const own = units.filter(({ firstFrame, frames }) => firstFrame >= begun && firstFrame + frames <= there)
  const whole = own.reduce((n, { frames }) => n + frames, begun)
  if (whole !== there) {
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: 'resume: kept latents',
      expected: `whole units of a video of ${total} latent frames, ${begun} of them given`,
      received: `${there} latent frames`,
    })
  }
  const first = begun > 0 ? [{ first: 0, frames: begun, what: 'decoding the given frames' }] : []
  return [
    ...first,
    ...own.map(({ index, firstFrame, frames }) => ({
      first: firstFrame,
      frames,
      what: `decoding unit ${index}`,
    })),
  ]
}

/** The recipe of a video, now that all of it is known. */
function finishRecipe(
  pipeline: Pipeline,
  { recipe, guidance }: Request,
  facts: Pick<Recipe, 'image' | 'continueFrom' | 'model' | 'backend' | 'adapters'>,
  given: Tensor | undefined,
): Recipe {
  const known = Object.fromEntries(Object.entries(facts).filter(([, value]) => value !== undefined))
  const whole: Recipe = { ...recipe, ...known }
  const latents = latentsOf(pipeline, whole, given)
  checkLength(whole, pixelFrames(latents))
  if (typeof guidance !== 'function') return whole
  const units = 1 + (latents - 1) / (pipeline.config.framesPerUnit ?? 1)
  return { ...whole, guidance: Array.from({ length: units }, (_, unit) => guidance(unit)) }
}

/** What the maker of a recipe should know before its bits are compared. */
function differences(
  { made }: Request,
  here: Record<'model' | 'backend' | 'dtype' | 'quantize', string | undefined>,
): string[] {
  const names = {
    model: 'another model',
    backend: 'other kernels',
    dtype: 'another compute type',
    quantize: 'other rounding',
  }
  // A recipe without a rounding was made without; options that are none say nothing about it.
  const was = { ...made, quantize: made.dtype === undefined ? undefined : (made.quantize ?? 'none') }
  return (['model', 'backend', 'dtype', 'quantize'] as const)
    .filter((name) => was[name] !== undefined && here[name] !== undefined && was[name] !== here[name])
    .map(
      (name) =>
        `The recipe was made with ${names[name]} (${was[name]}, not ${here[name]}): the video will differ`,
    )
}

/** How far the steps of all videos are. Later stages cost many times what earlier ones do, so tokens are counted. */
class Progress {
  readonly #videos: number
  readonly #began = performance.now()
  #costs: readonly number[] = []
  #finished = 0
  #step = 0
  #paid = 0
  #left = 0

  constructor(videos: number) {
    this.#videos = videos
  }

  /** Begins the next video, of which the last `left` steps have to be made; all cost the same. */
  begin(costs: readonly number[], left: number): void {
    const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0)
    if (this.#costs.length === 0) this.#left = this.#videos * sum(costs)
    this.#finished += this.#costs.length
    this.#costs = costs
    this.#step = costs.length - left
    this.#left -= sum(costs.slice(0, this.#step))
  }

  step(): { done: number; total: number; etaMs: number } {
    const cost = this.#costs[this.#step++] as number
    this.#paid += cost
    this.#left -= cost
    const etaMs = ((performance.now() - this.#began) / this.#paid) * this.#left
    return { done: this.#finished + this.#step, total: this.#videos * this.#costs.length, etaMs }
  }
}
