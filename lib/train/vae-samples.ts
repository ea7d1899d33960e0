import { PyraflowError } from '../engine/errors.ts'
import { type ContactClip, contactSheet } from '../io/contact-sheet.ts'
import type { CausalVideoVAE } from '../models/causal-vae.ts'
import { framesEncode } from '../ops/frames.ts'
import { sliced } from '../tensor/sliced.ts'
import type { Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { Bucket } from './buckets.ts'
import type { Dataset } from './dataset.ts'
import { throughSteps } from './vae-validation.ts'

/** Clips to look at while a VAE is trained, each beside what the VAE makes of it. */
export interface ReconstructionOptions {
  /** Steps between grids. */
  every?: number
  /** Whole clips shown, the first of the validation clips, or of those trained on where there are none; default 4. */
  clips?: number
  /** Frames shown of each, 4. */
  shownFrames?: number
}

/** A clip through the VAE and back: u8 [1, T, H, W, 3]. */
export function* reconstructionSteps(
  model: CausalVideoVAE,
  frames: Uint8Array,
  bucket: Bucket,
): Steps<Tensor> {
  const { decoded } = yield* throughSteps(model, frames, bucket)
  return framesEncode(decoded)
}

/**
 * Writes clips and their reconstructions side by side as one contact sheet.
 *
 * @throws ERR_OPTION for no clips; ERR_IO naming a clip that cannot be read, or the sheet; ERR_ABORTED
 */
export async function reconstructionGrid(
  model: CausalVideoVAE,
  data: Dataset,
  options: ReconstructionOptions & { signal?: AbortSignal | undefined },
  path: string,
): Promise<void> {
  const { clips = 4, shownFrames = 4, signal } = options
  if (!(Number.isInteger(clips) && clips > 0)) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'samples.clips',
      expected: 'an integer from 1',
      received: String(clips),
    })
  }
  const shown: ContactClip[] = []
  for (let i = 0; i < Math.min(clips, data.length); i++) {
    const frames = await data.load(i, signal)
    const bucket = data.buckets[data.bucketOf(i)] as Bucket
    const made = await sliced(() => reconstructionSteps(model, frames, bucket), { grad: false })
    const again = (await made.read()) as Uint8Array
    made.dispose()
    const { width, height } = bucket
    const { name } = data.item(i)
    shown.push({ frames, width, height, label: name })
    shown.push({ frames: again, width, height, label: 'reconstructed' })
  }
  await contactSheet(path, shown, { columns: 2, framesPerClip: shownFrames })
}
