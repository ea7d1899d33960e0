import { permute, reshape } from '../ops/copy.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** Every frame of a video [B, C, T, H, W] as a channels-last image [B·T, 1, H, W, C] for convolutions of depth 1. */
export function framesOf(video: Tensor): Tensor {
  const [b, c, t, h, w] = video.shape as [number, number, number, number, number]
  return reshape(permute(video, [0, 2, 3, 4, 1]), [b * t, 1, h, w, c])
}
