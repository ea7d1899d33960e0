import { engine } from '../engine/engine.ts'
import { record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectThat, folded } from './check.ts'

/**
 * `factor` times the half-size image, bilinear at half-pixel positions without a wider filter: the mean of each
 * 2×2 block for even sizes.
 *
 * @param x - [..., h, w]
 * @returns [..., ⌊h/2⌋, ⌊w/2⌋]
 */
export function downsample(x: Tensor, factor = 1): Tensor {
  expectFloats('downsample', x)
  const [h, w] = [x.shape[x.rank - 2] ?? 0, x.shape[x.rank - 1] ?? 0]
  expectThat(x.rank >= 2 && h >= 2 && w >= 2, 'downsample', 'x [..., h, w] of at least 2×2', x)
  const y = Tensor.empty([...x.shape.slice(0, -2), Math.floor(h / 2), Math.floor(w / 2)], x.dtype)
  engine.run('downsample', [folded(x, 2)], [folded(y, 2)], [factor])
  record([x], [y], ([g]) => {
    const dx = Tensor.empty(x.shape, x.dtype)
    engine.run('downsample_backward', [folded(g as Tensor, 2)], [folded(dx, 2)], [factor])
    return [dx]
  })
  return y
}
