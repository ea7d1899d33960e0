import { PyraflowError } from '../engine/errors.ts'

/** What a generation starts from: nothing, or a given first frame. */
export type UnitMode = 't2v' | 'i2v'

/** How frames are grouped. */
export interface UnitOptions {
  /** f, latent frames of one autoregressive unit; weights call it `frame_per_unit`. */
  readonly framesPerUnit?: number
  readonly mode?: UnitMode
}

/** One autoregressive unit of a generation, counted in latent frames. */
export interface Unit {
  readonly index: number
  readonly firstFrame: number
  readonly frames: number
  /** First frame of the noise draw that this unit uses; i2v draws none for its given first frame. */
  readonly noiseFrame: number
  /** True for the image of i2v, which is encoded instead of generated. */
  readonly given: boolean
}

/** How long a video should be: at least `frames` pixel frames, or about `seconds`. */
export type VideoLength = (
  | { readonly frames: number; readonly seconds?: undefined }
  | { readonly seconds: number; readonly frames?: undefined }
) & {
  /** Frames a second, 24 in every published model. */
  readonly fps?: number
  readonly framesPerUnit?: number
}

// Every latent frame after the first holds this many pixel frames.
const temporalFactor = 8

/**
 * Latent frames of a video (spec/method.md §1): `seconds` is rounded to the nearest possible length,
 * `frames` up, and the result is always 1 + m·framesPerUnit. 5 s → 16, 10 s → 31, 1 frame → 1.
 *
 * @throws PyraflowError `ERR_OPTION` for a length that is not positive.
 */
export function latentFrames(length: VideoLength): number {
  const { fps = 24, framesPerUnit = 1 } = length
  checkPositive('framesPerUnit', framesPerUnit)
  const value = length.frames ?? length.seconds
  const isCount = length.frames === undefined || Number.isSafeInteger(length.frames)
  if (!(typeof value === 'number' && value > 0 && Number.isFinite(value) && fps > 0 && isCount)) {
    throw invalid('video length', 'a positive number of seconds or of whole frames', value, 'Try seconds: 5')
  }
  const steps =
    length.frames === undefined
      ? Math.round((value * fps) / temporalFactor)
      : Math.ceil((value - 1) / temporalFactor)
  return 1 + Math.ceil(steps / framesPerUnit) * framesPerUnit
}

/** Pixel frames that `frames` latent frames decode to: 8(T − 1) + 1. */
export function pixelFrames(frames: number): number {
  checkPositive('latent frames', frames)
  return temporalFactor * (frames - 1) + 1
}

/**
 * The units of a generation whose noise has `frames` latent frames (T of spec/method.md §8.2, 8.3).
 * t2v: one frame, then units of f, and T − 1 must be a multiple of f. i2v: the image, then T/f − 1 units
 * of f, and T must be a multiple of f; the result has 1 + (T/f − 1)·f frames.
 *
 * @throws PyraflowError `ERR_OPTION` when T does not divide into units.
 */
export function unitsForFrames(frames: number, options: UnitOptions = {}): readonly Unit[] {
  const { framesPerUnit: f = 1, mode = 't2v' } = options
  checkPositive('latent frames', frames)
  checkPositive('framesPerUnit', f)
  const rest = mode === 'i2v' ? frames : frames - 1
  if (rest % f !== 0) {
    throw invalid(
      'latent frames',
      mode === 'i2v' ? `a multiple of ${f}` : `1 + a multiple of ${f}`,
      frames,
      'Take the number from latentFrames or noiseFrames with the same framesPerUnit',
    )
  }
  const count = mode === 'i2v' ? rest / f : 1 + rest / f
  return Object.freeze(
    Array.from({ length: count }, (_, index): Unit => {
      const firstFrame = index === 0 ? 0 : 1 + (index - 1) * f
      const noiseFrame = mode === 'i2v' && index > 0 ? (index - 1) * f : firstFrame
      const given = mode === 'i2v' && index === 0
      return Object.freeze({ index, firstFrame, frames: index === 0 ? 1 : f, noiseFrame, given })
    }),
  )
}

/** Latent frames of noise to draw for a result of `frames` latent frames: T of {@link unitsForFrames}. */
export function noiseFrames(frames: number, options: UnitOptions = {}): number {
  const { framesPerUnit: f = 1, mode = 't2v' } = options
  checkPositive('latent frames', frames)
  checkPositive('framesPerUnit', f)
  return mode === 'i2v' ? (1 + Math.ceil((frames - 1) / f)) * f : 1 + Math.ceil((frames - 1) / f) * f
}

/** Whole units in a training clip of `frames` latent frames: 1 + ⌊(T − 1)/f⌋. */
export function unitsInClip(frames: number, framesPerUnit = 1): number {
  checkPositive('latent frames', frames)
  checkPositive('framesPerUnit', framesPerUnit)
  return 1 + Math.floor((frames - 1) / framesPerUnit)
}

/** Throws `ERR_OPTION` unless `value` is an integer from 1. */
export function checkPositive(what: string, value: number): void {
  if (Number.isSafeInteger(value) && value >= 1) return
  throw invalid(what, 'an integer from 1', value, 'Count latent frames, the first one included')
}

function invalid(what: string, expected: string, received: unknown, remedy: string): PyraflowError {
  return new PyraflowError('ERR_OPTION', { what, expected, received: String(received), remedy })
}
