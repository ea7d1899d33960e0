import { engine } from '../engine/engine.ts'
import { record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectThat, folded } from './check.ts'

/**
 * The double-size image by repeating each element 2×2.
 *
 * @param x - [..., h, w]
 * @returns [..., 2h, 2w]
 */
export function upsample(x: Tensor): Tensor {
  expectFloats('upsample', x)
  expectThat(x.rank >= 2, 'upsample', 'x [..., h, w]', x)
  const [h, w] = x.shape.slice(-2) as [number, number]
  const y = Tensor.empty([...x.shape.slice(0, -2), 2 * h, 2 * w], x.dtype)
  engine.run('upsample', [folded(x, 2)], [folded(y, 2)], [])
  record([x], [y], ([g]) => [blockSum(g as Tensor, x, 1)])
  return y
}

/** `factor` times the sum of each 2×2 block of `g`, in the shape and dtype of `like`: the gradient of upsampling. */
export function blockSum(g: Tensor, like: Tensor, factor: number): Tensor {
  const dx = Tensor.empty(like.shape, like.dtype)
  engine.run('upsample_backward', [folded(g, 2)], [folded(dx, 2)], [factor])
  return dx
}
