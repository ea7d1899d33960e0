import { PyraflowError } from '../engine/errors.ts'
import { imageSize } from '../io/image.ts'
import type { VideoBackend } from '../io/video.ts'
import type { BadReason } from './bad-items.ts'
import { type Bucket, bucketName, type ClipInfo, chooseBucket, framesAt } from './buckets.ts'
import type { DatasetItem } from './dataset-list.ts'

/** What a file holds, as its container says. @throws ERR_IO naming it when it is unreadable; ERR_ABORTED */
export async function clipInfo(
  { kind, path }: Pick<DatasetItem, 'kind' | 'path'>,
  backend: VideoBackend,
  signal?: AbortSignal,
): Promise<ClipInfo> {
  if (kind === 'image') return { kind, ...(await imageSize(path)), fps: 1, frames: 1 }
  return { kind, ...(await backend.probe(path, signal)) }
}

/** The error of a clip that does not fill its bucket. */
export function tooShort(path: string, frames: number, wanted: number): PyraflowError {
  return new PyraflowError('ERR_IO', {
    what: `clip ${path}`,
    expected: `at least ${wanted} frames`,
    received: `${frames}`,
    remedy: "remove it, add a bucket of fewer frames, or repeat short clips (short: 'repeat')",
  })
}

/**
 * The bucket of a file, or why it has none.
 *
 * @param info - not needed where there is one bucket
 */
export function placeItem(
  { kind, path }: Pick<DatasetItem, 'kind' | 'path'>,
  buckets: readonly Bucket[],
  how: { fps?: number | undefined; short: 'reject' | 'repeat' },
  info?: ClipInfo,
): { index: number } | { reason: BadReason; error: PyraflowError } {
  const picture = kind === 'image' && buckets.every(({ frames }) => frames > 1)
  if (picture) {
    const error = new PyraflowError('ERR_IO', {
      what: `picture ${path}`,
      expected: 'a bucket of one frame',
      received: buckets.map(bucketName).join(', '),
      remedy: 'add such a bucket, or remove the picture',
    })
    return { reason: 'bucket', error }
  }
  if (!info) return { index: 0 }
  const { index, shortest } = chooseBucket(info, buckets, how.fps)
  if (shortest === undefined || how.short === 'repeat') return { index }
  return { reason: 'short', error: tooShort(path, framesAt(info, how.fps), shortest) }
}
