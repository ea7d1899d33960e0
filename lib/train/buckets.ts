import { PyraflowError } from '../engine/errors.ts'

/** Size and length of the clips of a batch; one frame: still pictures. */
export interface Bucket {
  readonly width: number
  readonly height: number
  readonly frames: number
}

/** What a file holds, as its container says. */
export interface ClipInfo {
  readonly kind: 'video' | 'image'
  readonly width: number
  readonly height: number
  readonly fps: number
  readonly frames: number
}

export const bucketName = ({ width, height, frames }: Bucket): string => `${width}×${height}×${frames}`

/** @throws ERR_OPTION for none, a size that is no positive integer, or one that is named twice */
export function checkBuckets(buckets: readonly Bucket[]): void {
  const wrong = (expected: string, received: string): PyraflowError =>
    new PyraflowError('ERR_OPTION', { what: 'buckets', expected, received })
  if (buckets.length === 0) throw wrong('at least one size', 'none')
  for (const [i, bucket] of buckets.entries()) {
    for (const name of ['width', 'height', 'frames'] as const) {
      if (Number.isInteger(bucket[name]) && bucket[name] > 0) continue
      throw wrong(`a positive integer for ${name}`, String(bucket[name]))
    }
    if (buckets.findIndex((other) => bucketName(other) === bucketName(bucket)) !== i) {
      throw wrong('every size once', `${bucketName(bucket)} twice`)
    }
  }
}

/** Frames of a clip after resampling, as its container says. */
export function framesAt(info: ClipInfo, fps: number | undefined): number {
  return fps === undefined || info.kind === 'image'
    ? info.frames
    : Math.max(1, Math.round((info.frames * fps) / info.fps))
}

/** Whether a file would have to be enlarged to cover a size. */
export function upscales(info: ClipInfo, { width, height }: Pick<Bucket, 'width' | 'height'>): boolean {
  return info.width < width || info.height < height
}

/**
 * The bucket of a file: of those with the nearest aspect ratio, |w/h − W/H| (spec/training.md §4), the largest size that
 * needs no enlarging, else the smallest, and of those the longest that the clip fills. A picture goes into buckets of
 * one frame, a video into longer ones where there are any.
 *
 * @returns its index, and how many frames it takes where the clip is too short for it
 */
export function chooseBucket(
  info: ClipInfo,
  buckets: readonly Bucket[],
  fps: number | undefined,
): { index: number; shortest?: number } {
  const of = (i: number): Bucket => buckets[i] as Bucket
  const all = buckets.map((_, i) => i)
  const fitting = all.filter((i) => of(i).frames > 1 === (info.kind === 'video'))
  let left = fitting.length > 0 ? fitting : all
  const keepBest = (score: (i: number) => number): void => {
    const best = Math.min(...left.map(score))
    left = left.filter((i) => score(i) <= best + 1e-9)
  }
  keepBest((i) => Math.abs(info.width / info.height - of(i).width / of(i).height))
  const area = (i: number): number => of(i).width * of(i).height
  keepBest((i) => (upscales(info, of(i)) ? area(i) : -area(i)))
  const filled = left.filter((i) => of(i).frames <= framesAt(info, fps))
  if (filled.length > 0) left = filled
  keepBest((i) => (filled.length > 0 ? -of(i).frames : of(i).frames))
  const index = left[0] as number
  return filled.length > 0 ? { index } : { index, shortest: of(index).frames }
}
