import { createHash } from 'node:crypto'
import { setImmediate } from 'node:timers/promises'
import { PyraflowError } from '../engine/errors.ts'
import { loadClip } from '../io/clip.ts'
import { type ImageSource, imageSize, loadImage } from '../io/image.ts'
import { concat } from '../ops/copy.ts'
import type { Pipeline } from '../pipeline.ts'
import { Generator } from '../tensor/generator.ts'
import { keep, scope } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'
import { networkOf } from './adapters.ts'
import { denoise, latentsOf } from './denoise.ts'
import { encodeFrames, type LatentClip, loadLatents, type Work } from './latents.ts'
import type { ContinueSource } from './options.ts'
import type { Recipe } from './recipe.ts'
import { type Request, resolveOptions, wrong } from './resolve.ts'
import { PromptFeatures } from './texts.ts'

/** Above this share of a picture that cropping takes away its maker is told. */
const CROP = 0.1

export interface Given {
  /** Normalised latents [1, C, T, h, w] that the video begins with; the caller disposes them. */
  latents: Tensor | undefined
  /** What the recipe says of it. */
  facts: Pick<Recipe, 'image' | 'continueFrom'>
}

export interface GivenWork extends Work {
  onWarning: (message: string) => void
}

/** The latents of a request's image or of what it continues. */
export async function givenLatents(pipeline: Pipeline, request: Request, work: GivenWork): Promise<Given> {
  const { image, continueFrom, recipe } = request
  const generator = streamOf(recipe)
  if (image !== undefined) return fromImage(pipeline, recipe, image, generator, work)
  if (continueFrom === undefined) return { latents: undefined, facts: {} }
  const given = await fromSource(pipeline, recipe, continueFrom, generator, work)
  checkGiven(pipeline, recipe, given.latents)
  return given
}

export const streamOf = ({ seed }: Recipe): Generator => new Generator(seed).stream('generate')

async function fromImage(
  pipeline: Pipeline,
  recipe: Recipe,
  image: ImageSource,
  generator: Generator,
  work: GivenWork,
): Promise<Given> {
  const { width, height, maxMemory } = recipe
  const source = await imageSize(image)
  const kept =
    Math.min(source.width / source.height, width / height) /
    Math.max(source.width / source.height, width / height)
  if (1 - kept > CROP) {
    const lost = source.width * height > source.height * width ? 'width' : 'height'
    work.onWarning(
      `The image is ${source.width}×${source.height}: ${Math.round(100 * (1 - kept))} % of its ${lost} ` +
        `is cut off to make it ${width}×${height}`,
    )
  }
  const frames = await loadImage(image, recipe)
  const latents = await encodeFrames(
    pipeline,
    { frames, width, height, maxMemory },
    generator.stream('image'),
    work,
  )
  const bytes = typeof image === 'string' ? undefined : image instanceof Uint8Array ? image : image.data
  return { latents, facts: { image: bytes === undefined ? (image as string) : await hashOf(bytes) } }
}

async function fromSource(
  pipeline: Pipeline,
  recipe: Recipe,
  source: ContinueSource,
  generator: Generator,
  work: GivenWork,
): Promise<Given & { latents: Tensor }> {
  if (typeof source === 'string') {
    const facts = { continueFrom: source }
    if (source.endsWith('.safetensors')) return { latents: toTensor(loadLatents(source)), facts }
    const { width, height, fps } = recipe
    const frames = await loadClip(source, { width, height, fps, signal: work.signal })
    return { latents: await fromFrames(pipeline, recipe, frames, generator, work), facts }
  }
  if ('latents' in source)
    return { latents: toTensor(source.latents), facts: { continueFrom: source.recipe } }
  if ('shape' in source) {
    return { latents: toTensor(source), facts: { continueFrom: await hashOf(source.data) } }
  }
  if ('prompt' in source)
    return { latents: await remake(pipeline, source, work), facts: { continueFrom: source } }
  if (source.width !== recipe.width || source.height !== recipe.height) {
    throw wrong(
      'continueFrom',
      `frames of ${recipe.width}×${recipe.height}`,
      `${source.width}×${source.height}`,
    )
  }
  const latents = await fromFrames(pipeline, recipe, source.frames, generator, work)
  return { latents, facts: { continueFrom: await hashOf(source.frames) } }
}

async function fromFrames(
  pipeline: Pipeline,
  recipe: Recipe,
  frames: Uint8Array,
  generator: Generator,
  work: GivenWork,
): Promise<Tensor> {
  const { width, height, maxMemory } = recipe
  const count = frames.length / (width * height * 3)
  if (!Number.isInteger(count) || count === 0) {
    throw wrong('continueFrom', `whole RGB frames of ${width}×${height}`, `${frames.length} bytes`)
  }
  // What is continued is the end: frames that fill no unit are left out at the beginning.
  const unit = pipeline.vae.temporalFactor * (pipeline.config.framesPerUnit ?? 1)
  const extra = (count - 1) % unit
  if (extra > 0) {
    work.onWarning(
      `The clip has ${count} frames; its first ${extra} are left out, since units are ${unit} frames long`,
    )
  }
  const whole = frames.subarray(extra * width * height * 3)
  return encodeFrames(pipeline, { frames: whole, width, height, maxMemory }, generator.stream('clip'), work)
}

/** The latents of the video that a recipe makes. */
async function remake(pipeline: Pipeline, recipe: Recipe, work: GivenWork): Promise<Tensor> {
  const [request] = resolveOptions(pipeline, { ...recipe, signal: work.signal }) as [Request]
  const parts: Tensor[] = []
  let features: PromptFeatures | undefined
  const { network, dispose } = await networkOf(pipeline, request.recipe, work)
  try {
    features = await PromptFeatures.of(pipeline, [request.recipe], work)
    const { latents: given } = await givenLatents(pipeline, request, work)
    if (given) parts.push(given)
    const generator = streamOf(request.recipe)
    const { recipe } = request
    const frames = latentsOf(pipeline, recipe, given)
    const job = { network, recipe, features, generator, frames, given, signal: work.signal }
    for await (const event of denoise(pipeline, job)) if (event.type === 'unit') parts.push(event.latent)
    return keep(scope(() => concat(parts, 2)))
  } finally {
    dispose()
    features?.dispose()
    for (const part of parts) part.dispose()
  }
}

function toTensor({ shape, data }: LatentClip): Tensor {
  if (data.length === shape.reduce((a, b) => a * b, 1)) return keep(Tensor.from(data, shape))
  throw new PyraflowError('ERR_SHAPE', {
    what: 'continueFrom: latents',
    expected: `${shape.join(' × ')} numbers`,
    received: `${data.length}`,
  })
}

function checkGiven(pipeline: Pipeline, recipe: Recipe, latents: Tensor): void {
  const factor = pipeline.vae.spatialFactor
  const [h, w] = [recipe.height / factor, recipe.width / factor]
  const unit = pipeline.config.framesPerUnit ?? 1
  const [b, c, t, y, x] = latents.shape as [number, number, number, number, number]
  const fits = b === 1 && c === pipeline.vae.latentChannels && y === h && x === w && (t - 1) % unit === 0
  if (fits) return
  latents.dispose()
  throw wrong(
    'continueFrom',
    `latents [1, ${pipeline.vae.latentChannels}, 1 + ${unit}m, ${h}, ${w}] for ${recipe.width}×${recipe.height}`,
    `[${[b, c, t, y, x]}]`,
    'Continue a video at its own size, with the model that made it.',
  )
}

const HASHED_AT_ONCE = 4 * 1024 * 1024

/** A hash of many bytes that lets the event loop turn. */
async function hashOf(data: Uint8Array | Float32Array): Promise<string> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
  const hash = createHash('sha256')
  for (let at = 0; at < bytes.length; at += HASHED_AT_ONCE) {
    hash.update(bytes.subarray(at, at + HASHED_AT_ONCE))
    await setImmediate()
  }
  return `sha256:${hash.digest('hex').slice(0, 32)}`
}
