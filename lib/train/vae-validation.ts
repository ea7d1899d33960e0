import { PyraflowError } from '../engine/errors.ts'
import type { CausalVideoVAE } from '../models/causal-vae.ts'
import { cast } from '../ops/cast.ts'
import { framesDecode } from '../ops/frames.ts'
import { sliced } from '../tensor/sliced.ts'
import type { Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { Bucket } from './buckets.ts'
import type { Dataset } from './dataset.ts'
import type { StepLoss } from './run.ts'
import type { Reconstruction, VaeLoss } from './vae-loss.ts'

/** Means over held-out clips: `loss` as training weighs its terms, without the adversarial one, and the terms. */
export type VaeValidationLoss = { loss: number } & Record<string, number>

/** @throws ERR_OPTION for clips that this VAE cannot take whole, or a number of them that is none */
export function checkVaeValidation(model: CausalVideoVAE, data: Dataset, clips: number | undefined): void {
  if (clips !== undefined && !(Number.isInteger(clips) && clips > 0)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'validationClips',
      expected: 'an integer from 1',
      received: String(clips),
    })
  }
  const { spatialFactor: space, temporalFactor: time } = model
  const odd = data.buckets.find((b) => b.width % space || b.height % space || (b.frames - 1) % time)
  if (!odd) return
  throw new PyraflowError('ERR_OPTION', {
    what: 'validation',
    expected: `clips of a multiple of ${space} pixels and 1 + a multiple of ${time} frames`,
    received: `${odd.width}×${odd.height}×${odd.frames}`,
  })
}

/**
 * How well a VAE gives back clips that it is not trained on: each whole and by itself, decoded from the mean of its
 * posterior, so that nothing is drawn and all changes are the network's.
 *
 * @param options.clips - clips to use, from the first on; default all
 * @throws ERR_IO naming a clip that cannot be read, unless the data set leaves it out; ERR_ABORTED
 */
export async function vaeValidationLoss(
  model: CausalVideoVAE,
  loss: VaeLoss,
  data: Dataset,
  options: { clips?: number | undefined; signal?: AbortSignal | undefined } = {},
): Promise<VaeValidationLoss> {
  const count = Math.min(options.clips ?? data.length, data.length)
  const sums: Record<string, number> = { loss: 0 }
  let used = 0
  let left: unknown
  for (let i = 0; i < count; i++) {
    let frames: Uint8Array
    try {
      frames = await data.load(i, options.signal)
    } catch (error) {
      data.reject(i, error)
      left = error
      continue
    }
    const bucket = data.buckets[data.bucketOf(i)] as Bucket
    const judged = await sliced(() => judge(model, loss, frames, bucket), { grad: false })
    for (const [name, value] of Object.entries({ loss: judged.loss, ...judged.metrics })) {
      sums[name] = (sums[name] ?? 0) + (await value.item())
      value.dispose()
    }
    used++
  }
  if (used === 0) throw left
  return Object.fromEntries(
    Object.entries(sums).map(([name, sum]) => [name, sum / used]),
  ) as VaeValidationLoss
}

function* judge(model: CausalVideoVAE, loss: VaeLoss, frames: Uint8Array, bucket: Bucket): Steps<StepLoss> {
  const made = yield* throughSteps(model, frames, bucket)
  yield
  return yield* loss.validationSteps(made)
}

/** A whole clip, u8 RGB [T, H, W, 3], through the VAE and back, decoded from the mean of its posterior. */
export function* throughSteps(
  model: CausalVideoVAE,
  frames: Uint8Array,
  { width, height }: Bucket,
): Steps<Reconstruction> {
  const count = frames.length / (3 * width * height)
  const target = framesDecode(Tensor.from(frames, [1, count, height, width, 3]))
  yield
  const posterior = model.encode(cast(target, model.dtype))
  yield
  return { target, posterior, decoded: model.decode(posterior.mean) }
}
