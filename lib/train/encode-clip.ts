import { createHash } from 'node:crypto'
import { setImmediate } from 'node:timers/promises'
import { abortable } from '../engine/abortable.ts'
import { engine } from '../engine/engine.ts'
import { throwIfAborted } from '../engine/errors.ts'
import { bfloat16ToFloat32 } from '../io/safetensors.ts'
import type { CausalVideoVAE } from '../models/causal-vae.ts'
import type { VaePieces } from '../models/vae-plan.ts'
import { cast } from '../ops/cast.ts'
import { framesDecode } from '../ops/frames.ts'
import { keep } from '../tensor/scope.ts'
import { sliced } from '../tensor/sliced.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { Bucket } from './buckets.ts'

/** Bytes that are copied, hashed or added up before the event loop turns: about a millisecond of each. */
const AT_ONCE = 1 << 20

/** How many values there are, their sum and the sum of their squares. */
export type Moments = readonly [number, number, number]

/** What a clip is in a latent cache. */
export interface EncodedClip {
  /** [C, T, H, W]. */
  readonly shape: readonly number[]
  /** bf16 bits. */
  readonly mean: Uint16Array
  readonly logvar: Uint16Array
  /** Of the means as they are kept: those of the first frame, and of the others. */
  readonly moments: { readonly image: Moments; readonly video: Moments }
}

/** Shape of the latents of a clip, [C, T, H, W]. */
export function latentShape(vae: CausalVideoVAE, { width, height, frames }: Bucket): number[] {
  const [f, t] = [vae.spatialFactor, vae.temporalFactor]
  return [vae.latentChannels, (frames - 1) / t + 1, height / f, width / f]
}

/**
 * Encodes u8 RGB frames [T, H, W, 3] without ever blocking the event loop.
 *
 * @throws ERR_SHAPE for a size that the VAE cannot encode; ERR_MEMORY, ERR_ABORTED
 */
export async function encodeClip(
  vae: CausalVideoVAE,
  clip: Uint8Array,
  { width, height, frames }: Bucket,
  options: VaePieces & { signal?: AbortSignal | undefined } = {},
): Promise<EncodedClip> {
  const { signal, ...pieces } = options
  throwIfAborted(signal, 'encoding')
  const input = keep(Tensor.empty([1, frames, height, width, 3], 'u8'))
  const job = engine.newJob()
  try {
    for (let at = 0; at < clip.length; at += AT_ONCE) {
      engine.write(input.storage, at, clip.subarray(at, at + AT_ONCE))
      await setImmediate()
    }
    const posterior = await sliced(
      function* () {
        const { mean, logvar } = yield* vae.encodeSteps(framesDecode(input, vae.dtype), pieces)
        return { mean: cast(mean, 'bf16'), logvar: cast(logvar, 'bf16') }
      },
      { grad: false, job },
    )
    const shape = posterior.mean.shape.slice(1)
    const bits = async (t: Tensor): Promise<Uint16Array> => {
      const values = new Uint16Array(t.size)
      await abortable(engine.read(t.storage, t.byteOffset, values), signal, job, 'encoding')
      return values
    }
    try {
      const [mean, logvar] = [await bits(posterior.mean), await bits(posterior.logvar)]
      return { shape, mean, logvar, moments: await momentsOf(mean, shape) }
    } finally {
      posterior.mean.dispose()
      posterior.logvar.dispose()
    }
  } finally {
    input.dispose()
  }
}

async function momentsOf(bits: Uint16Array, shape: readonly number[]): Promise<EncodedClip['moments']> {
  const [channels, frames, h, w] = shape as [number, number, number, number]
  const area = h * w
  const sums = { image: [0, 0, 0] as [number, number, number], video: [0, 0, 0] as [number, number, number] }
  let since = 0
  for (let plane = 0; plane < channels * frames; plane++) {
    const s = plane % frames === 0 ? sums.image : sums.video
    const values = bfloat16ToFloat32(bits.subarray(plane * area, (plane + 1) * area))
    for (const v of values) {
      s[1] += v
      s[2] += v * v
    }
    s[0] += area
    since += area
    if (since < AT_ONCE / 4) continue
    since = 0
    await setImmediate()
  }
  return sums
}

/**
 * A hash of what the latents of a VAE depend on: the settings and weights of its encoder, in the type it computes in.
 * Copies agree, wherever they lie.
 *
 * @throws ERR_ABORTED
 */
export async function encoderHash(vae: CausalVideoVAE, signal?: AbortSignal): Promise<string> {
  const settings = Object.entries(vae.config).filter(([name]) => name.startsWith('encoder_'))
  const hash = createHash('sha256').update(JSON.stringify([vae.dtype, settings.sort()]))
  const names = [...vae.parameters.keys()].filter((name) => /^(encoder|quant_conv)\./.test(name))
  for (const name of names.sort()) {
    throwIfAborted(signal, 'reading the VAE')
    const parameter = vae.parameters.get(name) as Tensor
    hash.update(`${name} ${parameter.dtype} ${parameter.shape}\n`)
    const values = await parameter.floats()
    const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength)
    for (let at = 0; at < bytes.length; at += AT_ONCE) {
      hash.update(bytes.subarray(at, at + AT_ONCE))
      await setImmediate()
    }
  }
  return hash.digest('hex').slice(0, 32)
}
