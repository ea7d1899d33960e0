import { mkdir, readdir, rename, rm, stat, writeFile } from 'node:fs/promises'
import { extname, join } from 'node:path'
import sharp, { type Sharp } from 'sharp'
import { PyraflowError } from '../engine/errors.ts'
import { ioError, writeAtomically, writeFileAtomically } from './atomic.ts'
import { asciiJson, withGifComment } from './embedded.ts'
import { abortedError } from './ffmpeg.ts'
import { type EncodeOptions, encodeMp4, encodeWebm } from './video.ts'

/** Size, rate and tags of a clip to be saved; `metadata` is kept as JSON where the format has room for it. */
export type SaveOptions = EncodeOptions

function checkFrames(what: string, frames: Uint8Array, width: number, height: number): number {
  const frameBytes = width * height * 3
  const count = frames.length / frameBytes
  if (Number.isInteger(count) && count > 0) return count
  throw new PyraflowError('ERR_SHAPE', {
    what: `${what}: frames`,
    expected: `u8 [T, ${height}, ${width}, 3]`,
    received: `${frames.length} bytes`,
    remedy: 'give whole RGB frames of the stated width and height',
  })
}

/** Pages of an animation are stacked into one tall picture; `pageHeight` tells where to cut. */
function animation(frames: Uint8Array, count: number, { width, height, metadata }: SaveOptions): Sharp {
  const raw = { width, height: height * count, channels: 3 as const, pageHeight: height }
  return tagged(sharp(frames, { raw, limitInputPixels: false }), metadata)
}

// Exif holds ASCII only.
function tagged(image: Sharp, metadata: Record<string, string> | undefined): Sharp {
  return metadata ? image.withExif({ IFD0: { ImageDescription: asciiJson(metadata) } }) : image
}

// Encoders of pictures cannot be stopped, but nobody has to wait for them.
async function encoded(image: Sharp, path: string, signal: AbortSignal | undefined): Promise<Buffer> {
  const work = image.toBuffer()
  if (!signal) return await work
  let stop = (): void => undefined
  const aborted = new Promise<never>((_, reject) => {
    stop = () => reject(abortedError(`writing ${path}`, signal.reason))
    signal.addEventListener('abort', stop, { once: true })
    if (signal.aborted) stop()
  })
  work.catch(() => undefined)
  try {
    return await Promise.race([work, aborted])
  } finally {
    signal.removeEventListener('abort', stop)
  }
}

/** Whole-unit delays whose running sum follows the true time, so that 24 fps does not drift. */
export function frameDelays(count: number, fps: number, unitMs: number): number[] {
  const time = (i: number): number => Math.round((i * 1000) / fps / unitMs) * unitMs
  return Array.from({ length: count }, (_, i) => Math.max(unitMs, time(i + 1) - time(i)))
}

/**
 * Saves u8 RGB frames [T, H, W, 3] as an endless animated WebP.
 *
 * @throws PyraflowError `ERR_SHAPE` for partial frames, `ERR_IO` naming the file if it cannot be written
 */
export async function saveWebp(path: string, frames: Uint8Array, options: SaveOptions): Promise<void> {
  const count = checkFrames('saveWebp', frames, options.width, options.height)
  const delay = frameDelays(count, options.fps, 1)
  const image = animation(frames, count, options).webp({ quality: 90, effort: 3, loop: 0, delay })
  await writeFileAtomically(path, await encoded(image, path, options.signal))
}

/**
 * Saves u8 RGB frames [T, H, W, 3] as an endless GIF. The format counts time in 10 ms, so single delays are
 * uneven while the total length is right.
 *
 * @throws PyraflowError `ERR_SHAPE` for partial frames, `ERR_IO` naming the file if it cannot be written
 */
export async function saveGif(path: string, frames: Uint8Array, options: SaveOptions): Promise<void> {
  const count = checkFrames('saveGif', frames, options.width, options.height)
  const delay = frameDelays(count, options.fps, 10)
  const { metadata, ...rest } = options
  const image = animation(frames, count, rest).gif({ loop: 0, delay, effort: 4 })
  const gif = await encoded(image, path, options.signal)
  await writeFileAtomically(path, metadata ? withGifComment(gif, asciiJson(metadata)) : gif)
}

/**
 * Saves one u8 RGB picture [H, W, 3] as PNG.
 *
 * @throws PyraflowError `ERR_SHAPE` for a wrong length, `ERR_IO` naming the file if it cannot be written
 */
export async function savePng(
  path: string,
  pixels: Uint8Array,
  options: Omit<SaveOptions, 'fps'>,
): Promise<void> {
  const { width, height, metadata, signal } = options
  checkFrames('savePng', pixels, width, height)
  const image = tagged(sharp(pixels, { raw: { width, height, channels: 3 } }), metadata).png()
  await writeFileAtomically(path, await encoded(image, path, signal))
}

const frameName = (i: number): string => `frame-${String(i).padStart(5, '0')}.png`

/**
 * Saves u8 RGB frames [T, H, W, 3] as `frame-00000.png`, … in the folder `path`. All pictures are complete
 * before the first one shows up; frames of an earlier, longer video there are removed, other files stay.
 *
 * @throws PyraflowError `ERR_SHAPE` for partial frames, `ERR_IO` naming the folder, `ERR_ABORTED` after `signal`
 */
export async function savePngFrames(path: string, frames: Uint8Array, options: SaveOptions): Promise<void> {
  const { width, height, metadata, signal } = options
  const count = checkFrames('savePngFrames', frames, width, height)
  const bytes = width * height * 3
  const write = async (folder: string): Promise<void> => {
    await mkdir(folder)
    for (let i = 0; i < count; ++i) {
      if (signal?.aborted) throw abortedError(`writing ${path}`, signal.reason)
      const pixels = frames.subarray(i * bytes, (i + 1) * bytes)
      const image = tagged(sharp(pixels, { raw: { width, height, channels: 3 } }), metadata).png()
      await writeFile(join(folder, frameName(i)), await encoded(image, path, signal))
    }
  }
  const existing = await stat(path).catch(() => undefined)
  if (!existing) return writeAtomically(path, write)
  if (!existing.isDirectory()) throw ioError({ code: 'ENOTDIR' }, 'writing frames to', path)
  // An existing folder cannot be swapped in one step, so finished frames move in one by one.
  const staging = join(path, `.frames-${process.pid}.tmp`)
  try {
    await write(staging)
    for (let i = 0; i < count; ++i) await rename(join(staging, frameName(i)), join(path, frameName(i)))
    for (const name of await readdir(path)) {
      const index = /^frame-(\d+)\.png$/.exec(name)?.[1]
      if (index !== undefined && Number(index) >= count) await rm(join(path, name))
    }
  } catch (error) {
    throw ioError(error, 'writing frames to', path)
  } finally {
    await rm(staging, { recursive: true, force: true }).catch(() => {})
  }
}

/**
 * Saves a video by the ending of `path`: `.mp4` or `.webm` (both need ffmpeg), `.webp`, `.gif`, or no ending / `.png` for
 * a folder of PNG frames (`out/fox.png` makes the folder `out/fox`). A single frame is saved as a picture under `.png`.
 *
 * @throws PyraflowError `ERR_OPTION` for an unknown ending, else as the saver it picks
 */
export async function saveVideo(path: string, frames: Uint8Array, options: SaveOptions): Promise<void> {
  if (options.signal?.aborted) throw abortedError(`writing ${path}`, options.signal.reason)
  const ending = extname(path).toLowerCase()
  if (ending === '.mp4') return encodeMp4(path, frames, options)
  if (ending === '.webm') return encodeWebm(path, frames, options)
  if (ending === '.webp') return saveWebp(path, frames, options)
  if (ending === '.gif') return saveGif(path, frames, options)
  const { width, height } = options
  const single = frames.length === width * height * 3
  if (ending === '.png' && single) return savePng(path, frames, options)
  if (ending === '.png') return savePngFrames(path.slice(0, -ending.length), frames, options)
  if (ending === '') return savePngFrames(path, frames, options)
  throw new PyraflowError('ERR_OPTION', {
    what: `the format of ${path}`,
    expected: 'a name ending in .mp4, .webm, .webp, .gif or .png, or a folder for PNG frames',
    received: ending,
    remedy: 'rename the output, for example to .mp4',
  })
}

/** Pixels as they are: u8 RGB [height, width, 3]. */
export interface RawImage {
  data: Uint8Array
  width: number
  height: number
}

/** A path, the bytes of an encoded picture (PNG, JPEG, WebP, …), or raw pixels. */
export type ImageSource = string | Uint8Array | RawImage

const nameOf = (source: ImageSource): string => (typeof source === 'string' ? source : 'from memory')

async function open(source: ImageSource): Promise<Sharp> {
  if (typeof source === 'string') {
    await stat(source).catch((error: unknown) => {
      throw ioError(error, 'reading image', source)
    })
    return sharp(source)
  }
  if (source instanceof Uint8Array) return sharp(source)
  const { data, width, height } = source
  if (data.length !== width * height * 3) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'image',
      expected: `u8 RGB [${height}, ${width}, 3], ${width * height * 3} bytes`,
      received: `${data.length} bytes`,
    })
  }
  return sharp(data, { raw: { width, height, channels: 3 } })
}

async function readingImage<T>(source: ImageSource, read: (image: Sharp) => Promise<T>): Promise<T> {
  const image = await open(source)
  try {
    return await read(image)
  } catch (error) {
    throw new PyraflowError('ERR_IO', {
      what: `reading image ${nameOf(source)}`,
      expected: 'a PNG, JPEG, WebP, GIF, AVIF or TIFF picture',
      received: (error as Error).message,
      remedy: 'check the file, or convert it to PNG',
      cause: error,
    })
  }
}

/** Size of a picture, upright. @throws as {@link loadImage} */
export function imageSize(source: ImageSource): Promise<{ width: number; height: number }> {
  return readingImage(source, async (image) => {
    const { autoOrient, width, height } = await image.metadata()
    return { width: autoOrient.width ?? width, height: autoOrient.height ?? height }
  })
}

/**
 * Loads a picture as u8 RGB [height, width, 3]: turned upright, scaled by Lanczos until it covers the size, centre
 * cropped. Transparent parts become black.
 *
 * @throws PyraflowError `ERR_IO` naming the file if it is missing or not a picture; `ERR_SHAPE` for raw pixels of
 * another length
 */
export function loadImage(
  source: ImageSource,
  { width, height }: { width: number; height: number },
): Promise<Uint8Array> {
  return readingImage(source, async (image) => {
    const upright = image.autoOrient().flatten({ background: '#000' }).toColourspace('srgb')
    const fitted = upright.resize(width, height, { fit: 'cover', position: 'centre', kernel: 'lanczos3' })
    const { data } = await fitted.raw().toBuffer({ resolveWithObject: true })
    return new Uint8Array(data.buffer, data.byteOffset, data.length)
  })
}

/** Loads the frames of an animated WebP or GIF as {@link loadImage} does: u8 RGB [T, height, width, 3]. */
export function loadAnimation(
  path: string,
  { width, height }: { width: number; height: number },
): Promise<Uint8Array> {
  return readingImage(path, async () => {
    const image = sharp(path, { animated: true, limitInputPixels: false }).flatten({ background: '#000' })
    const fitted = image.toColourspace('srgb').resize(width, height, { fit: 'cover', kernel: 'lanczos3' })
    const { data } = await fitted.raw().toBuffer({ resolveWithObject: true })
    return new Uint8Array(data.buffer, data.byteOffset, data.length)
  })
}
