import { PyraflowError } from '../engine/errors.ts'
import { slice } from '../ops/copy.ts'
import { downsample } from '../ops/downsample.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { HistoryPiece } from './history.ts'

/**
 * Latents [..., h, w] at every resolution of a pyramid of `stages` levels, lowest first (eq. 3); the last entry is
 * `x` itself. Odd sizes are floored, as the reference does.
 *
 * @throws PyraflowError `ERR_OPTION` when a level would be empty.
 */
export function latentPyramid(x: Tensor, stages: number): Tensor[] {
  return halvings(x, stages, 1)
}

/**
 * White noise [..., h, w] at every resolution, lowest first (eq. 4). A mean of four unit normals has standard
 * deviation 1/2, so every halving is doubled to stay of unit variance.
 *
 * @throws PyraflowError `ERR_OPTION` when a level would be empty.
 */
export function noisePyramid(noise: Tensor, stages: number): Tensor[] {
  return halvings(noise, stages, 2)
}

/**
 * The clips that a plan of {@link planHistory} takes from a pyramid of latents [B, C, T, h, w], in the plan's order
 * (oldest first).
 *
 * @throws PyraflowError `ERR_SHAPE` when the plan needs frames or levels that the pyramid lacks.
 */
export function historyClips(pyramid: readonly Tensor[], pieces: readonly HistoryPiece[]): Tensor[] {
  return pieces.map(({ firstFrame, frameCount, level }) => {
    const source = pyramid[level]
    const frames = source?.shape[2] ?? 0
    if (!source || firstFrame + frameCount > frames) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'historyClips',
        expected: `frames ${firstFrame} to ${firstFrame + frameCount} at level ${level}`,
        received: source ? `${frames} frames` : `${pyramid.length} levels`,
        remedy: 'Build the pyramid from all earlier frames of the clip.',
      })
    }
    return slice(source, 2, firstFrame, frameCount)
  })
}

function halvings(x: Tensor, stages: number, factor: number): Tensor[] {
  const [h, w] = x.shape.slice(-2) as [number, number]
  const least = 2 ** (stages - 1)
  if (!Number.isSafeInteger(stages) || stages < 1 || h < least || w < least) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'stages of a pyramid',
      expected: `a whole number from 1 that leaves something of ${h}×${w}`,
      received: String(stages),
    })
  }
  const levels = [x]
  for (let i = 1; i < stages; i++) levels.unshift(downsample(levels[0] as Tensor, factor))
  return levels
}
