import { readdir, stat } from 'node:fs/promises'
import { extname, join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { ioError } from './atomic.ts'
import { loadAnimation, loadImage } from './image.ts'
import { decodeVideo } from './video.ts'

/**
 * The frames of a clip of any kind that can be saved, scaled to cover the size and cropped: a video file (through ffmpeg,
 * resampled to `fps`), an animated WebP or GIF, or a folder of PNG frames in the order of their names.
 *
 * @returns u8 RGB [T, height, width, 3]
 * @throws PyraflowError `ERR_IO` naming the file, `ERR_ABORTED`
 */
export async function loadClip(
  path: string,
  options: { width: number; height: number; fps: number; signal?: AbortSignal | undefined },
): Promise<Uint8Array> {
  const info = await stat(path).catch((error: unknown) => {
    throw ioError(error, 'reading video', path)
  })
  if (info.isDirectory()) return loadFolder(path, options)
  if (['.webp', '.gif'].includes(extname(path).toLowerCase())) return loadAnimation(path, options)
  return (await decodeVideo(path, options)).frames
}

async function loadFolder(path: string, size: { width: number; height: number }): Promise<Uint8Array> {
  const names = (await readdir(path)).filter((name) => name.endsWith('.png')).sort()
  if (names.length === 0) {
    throw new PyraflowError('ERR_IO', {
      what: `reading video ${path}`,
      expected: 'a folder of .png frames',
      received: 'none',
    })
  }
  const bytes = size.width * size.height * 3
  const frames = new Uint8Array(names.length * bytes)
  for (const [i, name] of names.entries()) frames.set(await loadImage(join(path, name), size), i * bytes)
  return frames
}
