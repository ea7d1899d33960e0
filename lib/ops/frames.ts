import { type DType, engine } from '../engine/engine.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectDType, expectFloats, expectShape } from './check.ts'

/**
 * Video in [−1, 1] to bytes: ⌊127.5·x + 127.5⌋ clamped to 0…255, NaN to 0.
 *
 * @param x - [B, 3, T, H, W]
 * @returns u8 [B, T, H, W, 3]
 */
export function framesEncode(x: Tensor): Tensor {
  expectFloats('framesEncode', x)
  expectShape('framesEncode', 'x [B, 3, T, H, W]', x, [null, 3, null, null, null])
  const [b, , t, h, w] = x.shape as [number, number, number, number, number]
  const y = Tensor.empty([b, t, h, w, 3], 'u8')
  engine.run('frames_encode', [x], [y], [])
  return y
}

/**
 * Bytes to video in [−1, 1]: v/127.5 − 1.
 *
 * @param x - u8 [B, T, H, W, 3]
 * @returns [B, 3, T, H, W]
 */
export function framesDecode(x: Tensor, dtype: DType = 'f32'): Tensor {
  expectDType('framesDecode', 'x', x, 'u8')
  expectShape('framesDecode', 'x [B, T, H, W, 3]', x, [null, null, null, null, 3])
  const [b, t, h, w] = x.shape as [number, number, number, number, number]
  const y = Tensor.empty([b, 3, t, h, w], dtype)
  engine.run('frames_decode', [x], [y], [])
  return y
}
