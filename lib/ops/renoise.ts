import { type DType, engine } from '../engine/engine.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectShape, expectThat, folded } from './check.ts'
import { scale } from './pointwise.ts'
import { type StreamOptions, streamWords } from './random.ts'
import { blockSum } from './upsample.ts'

/** Options of {@link renoise}. */
export interface RenoiseOptions extends Partial<StreamOptions> {
  /** Weight of the upsampled image. */
  readonly alpha: number
  /** Weight of the noise. */
  readonly beta: number
  /** γ in (−1, 1/3]: −γ is the covariance inside each 2×2 block. Default 0, unused when `noise` is given. */
  readonly gamma?: number | undefined
  /** [..., 2h, 2w], instead of drawing. */
  readonly noise?: Tensor | null | undefined
}

/**
 * alpha·Up₂(x) + beta·n′, the jump to the next resolution. n′ is `noise`, or drawn with covariance −γ between the
 * elements of a 2×2 block: n′ = √(1+γ)(z − m) + √(1−3γ)m, z standard normal and m its block mean.
 *
 * @param x - [..., h, w]
 * @returns [..., 2h, 2w]
 */
export function renoise(x: Tensor, options: RenoiseOptions): Tensor {
  const noise = options.noise ?? null
  expectFloats('renoise', x, noise)
  expectThat(x.rank >= 2, 'renoise', 'x [..., h, w]', x)
  const [h, w] = x.shape.slice(-2) as [number, number]
  const y = Tensor.empty([...x.shape.slice(0, -2), 2 * h, 2 * w], x.dtype)
  if (noise) expectShape('renoise', 'noise [..., 2h, 2w]', noise, y.shape)
  const { alpha, beta } = options
  const stream = streamWords({ seed: options.seed ?? 0, stream: options.stream ?? 0 })
  engine.run(
    'renoise',
    [folded(x, 2), noise && folded(noise, 2)],
    [folded(y, 2)],
    [alpha, beta, options.gamma ?? 0, ...stream],
  )
  const forNoise = needsGrad(noise)
  record([x, noise], [y], ([g]) => [
    blockSum(g as Tensor, x, alpha),
    forNoise ? scale(g as Tensor, beta) : null,
  ])
  return y
}

/**
 * The noise of {@link renoise} alone: standard normal numbers with covariance −γ inside each 2×2 block.
 *
 * @param shape - [..., H, W], both even
 */
export function blockNoise(
  shape: readonly number[],
  options: StreamOptions & { gamma: number; dtype?: DType | undefined },
): Tensor {
  const y = Tensor.empty(shape, options.dtype ?? 'f32')
  const even = shape.length >= 2 && shape.slice(-2).every((d) => d % 2 === 0)
  expectThat(even, 'blockNoise', 'a shape [..., H, W] with even H and W', y)
  engine.run('renoise', [null, null], [folded(y, 2)], [0, 1, options.gamma, ...streamWords(options)])
  return y
}
