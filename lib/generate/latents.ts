import { abortable } from '../engine/abortable.ts'
import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { denormaliseLatents, normaliseLatents } from '../flow/normalise.ts'
import { openSafetensors, type Safetensors, type TensorEntry, writeSafetensors } from '../io/safetensors.ts'
import { samplePosterior } from '../models/causal-vae.ts'
import type { Capture } from '../models/vae-pass.ts'
import { cast } from '../ops/cast.ts'
import { framesDecode, framesEncode } from '../ops/frames.ts'
import type { Pipeline } from '../pipeline.ts'
import { FiniteCheck, nonFinite } from '../sample/finite.ts'
import type { Generator } from '../tensor/generator.ts'
import { abortableSteps, sliced } from '../tensor/sliced.ts'
import type { Steps } from '../tensor/tape.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'

/** Normalised latents of a video, in ordinary memory. */
export interface LatentClip {
  /** [1, C, T, h, w]. */
  shape: readonly [number, number, number, number, number]
  data: Float32Array
}

const NAME = 'latents'

/** Writes latents to a safetensors file, its recipe among the metadata. @throws ERR_IO, ERR_ABORTED */
export async function saveLatents(
  path: string,
  { shape, data }: LatentClip,
  options: { recipe?: object; signal?: AbortSignal | undefined } = {},
): Promise<void> {
  const { recipe, signal } = options
  const metadata = recipe && { recipe: JSON.stringify(recipe) }
  await writeSafetensors(path, [{ name: NAME, dtype: 'F32', shape, data }], metadata, { signal })
}

/** Reads what {@link saveLatents} wrote. @throws ERR_IO; ERR_CHECKPOINT for another file */
export function loadLatents(path: string): LatentClip {
  const file = openSafetensors(path)
  const { shape } = latentsEntry(file)
  return { shape: shape as unknown as LatentClip['shape'], data: file.readFloats(NAME) }
}

/** Where latents lie in a file of {@link saveLatents}. @throws ERR_CHECKPOINT for another file */
export function latentsEntry({ path, entries }: Safetensors): TensorEntry {
  const entry = entries.get(NAME)
  if (entry?.shape.length === 5) return entry
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: path,
    expected: `a tensor '${NAME}' [1, C, T, h, w], as saving with latents: true writes it`,
    received: [...entries.keys()].slice(0, 3).join(', ') || 'no tensors',
  })
}

/** What decoding and encoding need to know of their caller. */
export interface Work {
  readonly signal: AbortSignal | undefined
  readonly job: number
}

/**
 * Frames [T, H, W, 3] as normalised latents [1, C, t, h, w], a sample of the posterior (spec/method.md §8.3). The caller
 * disposes them.
 */
export async function encodeFrames(
  pipeline: Pipeline,
  clip: { frames: Uint8Array; width: number; height: number; maxMemory: number | undefined },
  generator: Generator,
  work: Work,
): Promise<Tensor> {
  const { frames, width, height, maxMemory } = clip
  const { vae, dtype, config } = pipeline
  const count = frames.length / (width * height * 3)
  return await checked('encoding the given frames', work, function* (check, capture) {
    const x = framesDecode(Tensor.from(frames, [1, count, height, width, 3]))
    const encoding = vae.encodeSteps(cast(x, dtype), { maxMemory, capture })
    const posterior = yield* abortableSteps(encoding, work.signal)
    const noise = generator.normal(posterior.mean.shape, { dtype })
    const z = normaliseLatents(cast(samplePosterior(posterior, noise), 'f32'), config.normalisation)
    check.add('the encoder', z)
    return z
  })
}

/**
 * u8 RGB frames [T, H, W, 3] of normalised latents [1, C, t, h, w], by whichever decoding the caller chooses.
 * @throws ERR_ABORTED; ERR_NUMERICS naming `what` and the layer of the decoder; ERR_MEMORY
 */
export async function decodeFrames(
  pipeline: Pipeline,
  latents: Tensor,
  how: Work & { what: string; begins: boolean; decode: (z: Tensor) => Steps<Tensor> },
): Promise<Uint8Array> {
  const { config, dtype, vae } = pipeline
  const { what, begins, decode, signal } = how
  const decoder = (z: Tensor, capture?: Capture): Steps<Tensor> =>
    capture ? vae.decodeSteps(z, { capture }) : decode(z)
  const bytes = await checked(what, how, function* (check, capture) {
    const z = cast(denormaliseLatents(latents, config.normalisation, begins), dtype)
    const pixels = yield* abortableSteps(decoder(z, capture), signal)
    check.add('the decoder', pixels)
    return framesEncode(pixels)
  })
  try {
    return (await bytes.read()) as Uint8Array
  } finally {
    bytes.dispose()
  }
}

/**
 * Runs work and waits for its result. If that is not finite, runs it again with a `capture` to name the layer, where the
 * work has use for one.
 */
async function checked(
  what: string,
  { signal, job }: Work,
  steps: (check: FiniteCheck, capture?: Capture) => Steps<Tensor>,
): Promise<Tensor> {
  const run = async (capturing: boolean): Promise<{ result: Tensor; bad: string | undefined }> => {
    const check = new FiniteCheck()
    const capture = (name: string, t: Tensor): void => check.add(name, t)
    let result: Tensor | undefined
    try {
      result = await sliced(() => steps(check, capturing ? capture : undefined), { grad: false, job })
      return { result, bad: await abortable(check.first(), signal, job) }
    } catch (error) {
      check.dispose()
      result?.dispose()
      // Nobody waits for what is still queued.
      await engine.cancel(job)
      throw error
    }
  }
  const { result, bad } = await run(false)
  if (bad === undefined) return result
  result.dispose()
  const again = await run(true)
  again.result.dispose()
  throw nonFinite(what, again.bad ?? bad)
}

/** Latents as numbers in ordinary memory. */
export async function toClip(latents: readonly Tensor[]): Promise<LatentClip> {
  const [first] = latents as [Tensor, ...Tensor[]]
  const [, channels, , h, w] = first.shape as [number, number, number, number, number]
  const frames = latents.reduce((n, { shape }) => n + (shape[2] as number), 0)
  const shape = [1, channels, frames, h, w] as const
  const data = new Float32Array(sizeOf(shape))
  let before = 0
  for (const part of latents) {
    const values = await part.floats()
    const size = values.length / channels
    for (let c = 0; c < channels; c++) {
      data.set(values.subarray(c * size, (c + 1) * size), c * frames * h * w + before * h * w)
    }
    before += part.shape[2] as number
  }
  return { shape, data }
}
