import { concat, slice } from '../ops/copy.ts'
import { scale } from '../ops/pointwise.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** z_norm = (z − shift)·scale, with constants of their own for the first frame (spec/method.md (32)). */
export interface LatentNormalisation {
  readonly image: { readonly shift: number; readonly scale: number }
  readonly video: { readonly shift: number; readonly scale: number }
}

function perFrame(z: Tensor, begins: boolean, apply: (part: Tensor, first: boolean) => Tensor): Tensor {
  if (!begins) return apply(z, false)
  const frames = z.shape[2] as number
  const first = apply(frames === 1 ? z : slice(z, 2, 0, 1), true)
  return frames === 1 ? first : concat([first, apply(slice(z, 2, 1, frames - 1), false)], 2)
}

/** Normalises latents [B, C, T, H, W] that begin a video. */
export function normaliseLatents(z: Tensor, constants: LatentNormalisation): Tensor {
  return perFrame(z, true, (part, first) => {
    const c = first ? constants.image : constants.video
    return scale(part, c.scale, -c.shift * c.scale)
  })
}

/** The inverse of {@link normaliseLatents}; latents that do not begin a video have no first frame. */
export function denormaliseLatents(z: Tensor, constants: LatentNormalisation, begins = true): Tensor {
  return perFrame(z, begins, (part, first) => {
    const c = first ? constants.image : constants.video
    return scale(part, 1 / c.scale, c.shift)
  })
}
