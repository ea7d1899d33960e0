import { engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectShape, expectThat, sharedFlag, weightGrad } from './check.ts'

/** Options of {@link conv3d}, each along (time, height, width). */
export interface Conv3dOptions {
  readonly stride?: readonly [number, number, number] | undefined
  /** Zeros in front of the first frame (never behind the last: the convolution is causal), and on both sides in space. */
  readonly pad?: readonly [number, number, number] | undefined
}

/**
 * Causal 3-D convolution, channels last. With p the padding and s the stride, T' = ⌊(T + p_t − k_t)/s_t⌋ + 1 and
 * H' = ⌊(H + 2p_h − k_h)/s_h⌋ + 1, W' alike.
 *
 * @param x - [B, T, H, W, C]
 * @param w - [O, C, k_t, k_h, k_w], the order of published checkpoints
 * @param b - [O]
 * @returns [B, T', H', W', O]
 */
export function conv3d(x: Tensor, w: Tensor, b: Tensor | null = null, options: Conv3dOptions = {}): Tensor {
  const stride = options.stride ?? [1, 1, 1]
  const pad = options.pad ?? [0, 0, 0]
  expectFloats('conv3d', x, w, b)
  expectShape('conv3d', 'x [B, T, H, W, C]', x, [null, null, null, null, null])
  expectShape('conv3d', 'w [O, C, kt, kh, kw]', w, [null, x.shape[4] as number, null, null, null])
  const channels = w.shape[0] as number
  if (b) expectShape('conv3d', 'bias [O]', b, [channels])
  const out = [0, 1, 2].map((i) => {
    const zeros = (pad[i] as number) * (i === 0 ? 1 : 2)
    const room = (x.shape[i + 1] as number) + zeros - (w.shape[i + 2] as number)
    return Math.floor(room / (stride[i] as number)) + 1
  })
  expectThat(
    out.every((d) => d >= 1),
    'conv3d',
    `x at least as large as the kernel [${w.shape.slice(2).join(', ')}]`,
    x,
  )
  const scalars = [...stride, ...pad]
  const y = Tensor.empty([x.shape[0] as number, ...out, channels], x.dtype)
  engine.run('conv3d', [x, w, b], [y], scalars)

  const forX = needsGrad(x)
  const forW = needsGrad(w)
  const forB = b !== null && needsGrad(b)
  if (!forX && !forW && !forB) return y
  record([x, w, b], [y], ([grad]) => {
    const g = grad as Tensor
    let dx: Tensor | null = null
    if (forX) {
      dx = Tensor.empty(x.shape, x.dtype)
      engine.run('conv3d_backward_data', [g, w], [dx], scalars)
    }
    if (!forW && !forB) return [dx, null, null]
    const dw = forW ? weightGrad(w) : null
    const db = forB ? weightGrad(b as Tensor) : null
    const to = [dw?.buffer ?? Tensor.zeros(w.shape), db?.buffer ?? null]
    engine.run('conv3d_backward_weights', [x, g], to, [...scalars, sharedFlag(dw, db)])
    return [dx, dw?.result() ?? null, db?.result() ?? null]
  })
  return y
}
