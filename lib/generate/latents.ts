import { abortable } from '../engine/abortable.ts'
import { engine } from '../engine/engine.ts'
import { denormaliseLatents, normaliseLatents } from '../flow/normalise.ts'
import { loadImage } from '../io/image.ts'
import { samplePosterior } from '../models/causal-vae.ts'
import { cast } from '../ops/cast.ts'
import { framesDecode, framesEncode } from '../ops/frames.ts'
import type { Pipeline } from '../pipeline.ts'
import type { Generator } from '../tensor/generator.ts'
import { keep, scope } from '../tensor/scope.ts'
import { abortableSteps, sliced } from '../tensor/sliced.ts'
import { noGrad, type Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'

/** A still image as the normalised latent of a first frame [1, C, 1, h, w] (spec/method.md §8.3). */
export async function encodeImage(
  pipeline: Pipeline,
  path: string,
  size: { width: number; height: number },
  generator: Generator,
): Promise<Tensor> {
  const pixels = await loadImage(path, size)
  return keep(
    noGrad(() =>
      scope(() => {
        const x = framesDecode(Tensor.from(pixels, [1, 1, size.height, size.width, 3]))
        const posterior = pipeline.vae.encode(cast(x, pipeline.dtype))
        const noise = generator.stream('image').normal(posterior.mean.shape, { dtype: posterior.mean.dtype })
        return normaliseLatents(cast(samplePosterior(posterior, noise), 'f32'), pipeline.config.normalisation)
      }),
    ),
  )
}

/** u8 RGB frames [T, H, W, 3] of normalised latents [1, C, t, h, w], by whichever decoding the caller chooses. */
export async function decodeFrames(
  pipeline: Pipeline,
  latents: Tensor,
  how: {
    /** Whether the latents begin a video. */
    begins: boolean
    decode: (z: Tensor) => Steps<Tensor>
    signal: AbortSignal | undefined
    job: number
  },
): Promise<Uint8Array> {
  const { begins, decode, signal, job } = how
  const { config, dtype } = pipeline
  let bytes: Tensor | undefined
  try {
    bytes = await sliced(
      function* () {
        const z = cast(denormaliseLatents(latents, config.normalisation, begins), dtype)
        return framesEncode(yield* abortableSteps(decode(z), signal))
      },
      { grad: false, job },
    )
    await abortable(engine.idle(job), signal, job)
    return (await bytes.read()) as Uint8Array
  } catch (error) {
    // Nobody waits for what is still queued.
    await engine.cancel(job)
    throw error
  } finally {
    bytes?.dispose()
  }
}
