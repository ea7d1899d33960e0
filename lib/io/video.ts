import { stat } from 'node:fs/promises'
import { PyraflowError } from '../engine/errors.ts'
import { ioError, writeAtomically } from './atomic.ts'
import { abortedError, ffmpegCommand, ffprobeCommand, runChild } from './ffmpeg.ts'

/** What a container says about its first video stream; sizes are as shown (rotation and pixel aspect applied). */
export interface VideoInfo {
  width: number
  height: number
  fps: number
  /** Number of frames; an estimate from the duration where the container does not count them. */
  frames: number
}

export interface DecodeOptions {
  /** Resample to this rate by dropping or repeating frames (frames per second). */
  fps?: number
  /** Stop after this many frames. */
  maxFrames?: number
  /** With `height`: scale so that the frame covers `width`×`height`, then crop the centre. */
  width?: number
  height?: number
  /** What {@link VideoBackend.probe} said of the file; it is asked again otherwise. */
  info?: VideoInfo | undefined
  signal?: AbortSignal | undefined
}

export interface DecodedVideo {
  /** u8 RGB, [count, height, width, 3]. */
  frames: Uint8Array
  width: number
  height: number
  fps: number
  count: number
}

/** Frames as one [T, H, W, 3] array, or in pieces of any length in order (a video that is still being made). */
export type FrameSource = Uint8Array | Iterable<Uint8Array> | AsyncIterable<Uint8Array>

export interface EncodeOptions {
  width: number
  height: number
  fps: number
  /** Free-form tags kept in the file, for example `{ comment: JSON.stringify(options) }`. */
  metadata?: Record<string, string>
  signal?: AbortSignal | undefined
}

/** The seam behind which a decoder/encoder other than the ffmpeg program can stand. */
export interface VideoBackend {
  readonly name: string
  available(): Promise<boolean>
  probe(path: string, signal?: AbortSignal): Promise<VideoInfo>
  decode(path: string, options?: DecodeOptions): Promise<DecodedVideo>
  encodeMp4(path: string, frames: FrameSource, options: EncodeOptions): Promise<void>
}

/** Beyond this a decoded clip no longer fits in one typed array on every platform. */
const maxDecodedBytes = 2 ** 32 - 1

const availability = new Map<string, Promise<boolean>>()

/** Whether the ffmpeg program can be started; asked once per command and process. */
export function hasFfmpeg(): Promise<boolean> {
  const command = ffmpegCommand()
  let known = availability.get(command)
  if (!known) {
    known = runChild(command, ['-hide_banner', '-version']).then(
      ({ code }) => code === 0,
      () => false,
    )
    availability.set(command, known)
  }
  return known
}

/** An `ERR_IO` that names the clip and what to do with it. */
export function clipError(path: string, received: string): PyraflowError {
  return new PyraflowError('ERR_IO', {
    what: `reading video ${path}`,
    expected: 'a complete, readable clip',
    received,
    remedy: 'copy or re-encode the file, or remove it from the data set',
  })
}

/** The last line is where ffmpeg says why it gave up; addresses in it would only make messages differ. */
function reason(stderr: string): string {
  const last = stderr.split('\n').filter(Boolean).at(-1) ?? ''
  return last.replace(/\[[^\]]* @ 0x[0-9a-f]+\] */g, '').slice(0, 200) || 'no frames'
}

/** Throws `ERR_IO` unless `path` is a file with something in it. */
export async function requireFile(path: string): Promise<void> {
  const info = await stat(path).catch((error: unknown) => {
    throw ioError(error, 'reading video', path)
  })
  if (!info.isFile()) throw clipError(path, 'not a regular file')
  if (info.size === 0) throw clipError(path, 'an empty file')
}

const ratio = (text: unknown): number => {
  const [numerator, denominator = 1] = String(text ?? '')
    .split(/[/:]/)
    .map(Number)
  const value = (numerator ?? Number.NaN) / denominator
  return Number.isFinite(value) && value > 0 ? value : 0
}

interface ProbedStream {
  width?: number
  height?: number
  sample_aspect_ratio?: string
  avg_frame_rate?: string
  r_frame_rate?: string
  nb_frames?: string
  duration?: string
  tags?: { rotate?: string }
  side_data_list?: { rotation?: number }[]
}

/**
 * Reads size, rate and length of the first video stream of `path`.
 *
 * @throws PyraflowError `ERR_IO` naming the file if it is missing, empty, damaged or has no video stream
 */
export async function probeVideo(path: string, signal?: AbortSignal): Promise<VideoInfo> {
  await requireFile(path)
  let out = ''
  const decoder = new TextDecoder()
  const args = ['-v', 'error', '-select_streams', 'v:0', '-show_streams', '-show_format', '-of', 'json']
  const { code, stderr } = await runChild(ffprobeCommand(), [...args, `file:${path}`], {
    signal,
    onData: (chunk) => {
      out += decoder.decode(chunk, { stream: true })
    },
  })
  if (code !== 0) throw clipError(path, reason(stderr))
  const parsed = JSON.parse(out) as { streams?: ProbedStream[]; format?: { duration?: string } }
  const stream = parsed.streams?.[0]
  if (!stream?.width || !stream.height) throw clipError(path, 'no video stream')
  const fps = ratio(stream.avg_frame_rate) || ratio(stream.r_frame_rate) || 25
  const duration = Number(stream.duration ?? parsed.format?.duration ?? 0) || 0
  const size = [Math.round(stream.width * (ratio(stream.sample_aspect_ratio) || 1)), stream.height]
  const rotation = stream.side_data_list?.find((data) => data.rotation !== undefined)?.rotation
  if (Math.abs(Number(rotation ?? stream.tags?.rotate ?? 0)) % 180 === 90) size.reverse()
  const frames = Number(stream.nb_frames ?? 0) || Math.round(duration * fps)
  return { width: size[0], height: size[1], fps, frames }
}

/** The comment among the tags of a clip, or undefined. @throws PyraflowError as {@link probeVideo} */
export async function probeComment(path: string, signal?: AbortSignal): Promise<string | undefined> {
  await requireFile(path)
  let out = ''
  const onData = (chunk: Uint8Array): void => {
    out += Buffer.from(chunk).toString('latin1')
  }
  const args = ['-v', 'error', '-show_entries', 'format_tags', '-of', 'json', `file:${path}`]
  const { code, stderr } = await runChild(ffprobeCommand(), args, { signal, onData })
  if (code !== 0) throw clipError(path, reason(stderr))
  const text = Buffer.from(out, 'latin1').toString('utf8')
  const tags = (JSON.parse(text) as { format?: { tags?: Record<string, string> } }).format?.tags ?? {}
  return Object.entries(tags).find(([name]) => name.toLowerCase() === 'comment')?.[1]
}

function checkPositive(name: string, value: number | undefined, whole: boolean): void {
  if (value === undefined || (value > 0 && Number.isFinite(value) && (!whole || Number.isInteger(value))))
    return
  throw new PyraflowError('ERR_OPTION', {
    what: name,
    expected: whole ? 'a positive integer' : 'a positive number',
    received: String(value),
    remedy: `give another value for ${name}`,
  })
}

/** Throws `ERR_OPTION` naming the first option that is not a positive number. */
export function checkDecodeOptions({ fps, maxFrames, width, height }: DecodeOptions): void {
  checkPositive('fps', fps, false)
  checkPositive('maxFrames', maxFrames, true)
  checkPositive('width', width, true)
  checkPositive('height', height, true)
}

/**
 * ffmpeg's filter that scales by the larger of the two ratios, so that width×height is covered without gaps: it computes the
 * size itself from the frames it gets, which the caller then need not know.
 */
function coverFilter(width: number, height: number): string {
  const shown = 'round(iw*sar)'
  const scale = `max(${width}/${shown},${height}/ih)`
  const flags = 'lanczos+accurate_rnd+full_chroma_int+full_chroma_inp'
  return `scale=w='max(${width},round(${shown}*${scale}))':h='max(${height},round(ih*${scale}))':flags=${flags}`
}

/** Size and rate of the result and at most how many frames, asking the file only for what the caller leaves open. */
async function whatToDecode(
  path: string,
  { width, height, fps, maxFrames, info: known, signal }: DecodeOptions,
): Promise<{ width: number; height: number; rate: number; estimate: number }> {
  // Starting a program costs more than decoding a short clip; a longer one makes the buffer grow.
  if (width && height && fps && maxFrames && !known) {
    await requireFile(path)
    return { width, height, rate: fps, estimate: Math.min(maxFrames, 256) }
  }
  const info = known ?? (await probeVideo(path, signal))
  const frames = Math.ceil(info.frames * (fps ? fps / info.fps : 1)) + 1
  const estimate = Math.min(maxFrames ?? frames, frames)
  return { width: width ?? info.width, height: height ?? info.height, rate: fps ?? info.fps, estimate }
}

/**
 * Decodes a clip to u8 RGB frames [T, H, W, 3] through the ffmpeg program.
 *
 * @throws PyraflowError `ERR_IO` naming the file if it is unreadable or truncated, `ERR_OPTION` for bad
 *   sizes, `ERR_ABORTED` after `signal`
 */
export async function decodeVideo(path: string, options: DecodeOptions = {}): Promise<DecodedVideo> {
  const { fps, maxFrames, signal } = options
  checkDecodeOptions(options)
  const { width, height, estimate, rate } = await whatToDecode(path, options)
  // Cropping happens in RGB: on subsampled chroma ffmpeg would round the offset to even pixels.
  const filters = [
    ...(fps ? [`fps=${fps}`] : []),
    coverFilter(width, height),
    'format=rgb24',
    `crop=${width}:${height}`,
  ]
  const frameBytes = width * height * 3
  const capacity = estimate * frameBytes
  const tooLong = (bytes: number): void => {
    if (bytes <= maxDecodedBytes) return
    throw new PyraflowError('ERR_OPTION', {
      what: `maxFrames for ${path}`,
      expected: `at most ${Math.floor(maxDecodedBytes / frameBytes)} frames of ${width}×${height}`,
      received: String(Math.ceil(bytes / frameBytes)),
      remedy: 'decode fewer frames at a time (maxFrames) or a smaller size',
    })
  }
  tooLong(capacity)
  let buffer = new Uint8Array(Math.max(capacity, frameBytes))
  let used = 0
  const onData = (chunk: Uint8Array): void => {
    if (used + chunk.length > buffer.length) {
      const grown = Math.max(used + chunk.length, Math.min(buffer.length * 1.5, maxDecodedBytes))
      tooLong(grown)
      const larger = new Uint8Array(Math.ceil(grown))
      larger.set(buffer.subarray(0, used))
      buffer = larger
    }
    buffer.set(chunk, used)
    used += chunk.length
  }
  const { code, stderr } = await runChild(
    ffmpegCommand(),
    [
      ...[
        '-nostdin',
        '-hide_banner',
        '-v',
        'error',
        '-threads',
        '1',
        '-i',
        `file:${path}`,
        '-map',
        '0:v:0',
        '-an',
        '-sn',
      ],
      ...['-vf', filters.join(','), ...(maxFrames ? ['-frames:v', String(maxFrames)] : [])],
      ...(fps ? [] : ['-vsync', 'passthrough']),
      ...['-f', 'rawvideo', '-pix_fmt', 'rgb24', 'pipe:1'],
    ],
    { signal, onData },
  )
  const count = Math.floor(used / frameBytes)
  if (code !== 0 || count === 0 || used % frameBytes !== 0) throw clipError(path, reason(stderr))
  // A cut-off file still decodes with exit code 0; small defects in a whole file are only warnings.
  const complete = count === maxFrames
  if (!complete && /partial file|truncat|end of file|Invalid data found/i.test(stderr)) {
    throw clipError(path, `a file that ends early (${reason(stderr)})`)
  }
  const frames = buffer.length === used ? buffer : buffer.slice(0, used)
  return { frames, width, height, fps: rate, count }
}

/** Pieces of about one frame keep the pipe fed without copying a whole video into its queue. */
async function* pieces(source: FrameSource, frameBytes: number, done: (bytes: number) => void) {
  let total = 0
  for await (const array of source instanceof Uint8Array ? [source] : source) {
    total += array.length
    for (let at = 0; at < array.length; at += frameBytes) yield array.subarray(at, at + frameBytes)
  }
  if (total === 0 || total % frameBytes !== 0) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'video frames',
      expected: `u8 [T, H, W, 3], a multiple of ${frameBytes} bytes`,
      received: `${total} bytes`,
      remedy: 'give whole RGB frames of the stated width and height',
    })
  }
  done(total / frameBytes)
}

const H264 = ['-c:v', 'libx264', '-crf', '18']
const VP9 = [
  '-c:v',
  'libvpx-vp9',
  '-crf',
  '24',
  '-b:v',
  '0',
  '-deadline',
  'good',
  '-cpu-used',
  '4',
  '-row-mt',
  '1',
]

/**
 * Encodes u8 RGB frames as H.264 (x264, crf 18, 4:2:0, tagged bt709, index in front). The file appears under
 * `path` only when it is complete.
 *
 * @throws PyraflowError `ERR_OPTION` for odd sizes, `ERR_SHAPE` for a partial frame, `ERR_IO` naming the file if
 *   it cannot be written, `ERR_ABORTED` after `signal`
 */
export function encodeMp4(path: string, frames: FrameSource, options: EncodeOptions): Promise<void> {
  return encode(path, frames, options, [...H264, '-movflags', '+faststart+use_metadata_tags', '-f', 'mp4'])
}

/**
 * Encodes u8 RGB frames as VP9 in WebM, otherwise as {@link encodeMp4} does.
 *
 * @throws PyraflowError as {@link encodeMp4}
 */
export function encodeWebm(path: string, frames: FrameSource, options: EncodeOptions): Promise<void> {
  return encode(path, frames, options, [...VP9, '-f', 'webm'])
}

async function encode(
  path: string,
  frames: FrameSource,
  options: EncodeOptions,
  codec: readonly string[],
): Promise<void> {
  const { width, height, fps, metadata = {}, signal } = options
  checkPositive('width', width, true)
  checkPositive('height', height, true)
  checkPositive('fps', fps, false)
  if (width % 2 || height % 2) {
    throw new PyraflowError('ERR_OPTION', {
      what: `writing ${path}: size`,
      expected: 'even width and height (4:2:0 chroma)',
      received: `${width}×${height}`,
      remedy: 'crop to even sizes, or save as .webp or PNG frames',
    })
  }
  await writeAtomically(path, async (temporary) => {
    let count = 0
    const input = pieces(frames, width * height * 3, (n) => {
      count = n
    })
    const colour = ['-colorspace', 'bt709', '-color_primaries', 'bt709', '-color_trc', 'bt709']
    const { code, stderr } = await runChild(
      ffmpegCommand(),
      [
        ...['-hide_banner', '-v', 'error', '-y', '-f', 'rawvideo', '-pix_fmt', 'rgb24'],
        ...['-s', `${width}x${height}`, '-r', String(fps), '-i', 'pipe:0', '-an'],
        ...['-vf', 'scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int'],
        ...['-pix_fmt', 'yuv420p', ...colour, '-color_range', 'tv'],
        ...Object.entries(metadata).flatMap(([key, value]) => ['-metadata', `${key}=${value}`]),
        ...codec,
        `file:${temporary}`,
      ],
      { signal, input },
    )
    if (signal?.aborted) throw abortedError(`writing ${path}`, signal.reason)
    if (code === 0 && count > 0) return
    const full = /No space left/i.test(stderr)
    throw ioError({ code: full ? 'ENOSPC' : undefined, message: reason(stderr) }, 'encoding', path)
  })
}

/** The system's ffmpeg program: best quality, and no codec licence inside this package. */
export const ffmpegBackend: VideoBackend = {
  name: 'ffmpeg',
  available: hasFfmpeg,
  probe: probeVideo,
  decode: decodeVideo,
  encodeMp4,
}
