import sharp from 'sharp'
import { PyraflowError } from '../engine/errors.ts'
import { abortedError } from './ffmpeg.ts'
import {
  checkDecodeOptions,
  clipError,
  type DecodedVideo,
  type DecodeOptions,
  ffmpegBackend,
  hasFfmpeg,
  requireFile,
  type VideoBackend,
  type VideoInfo,
} from './video.ts'

// Only what is used here: the package is an optional peer, so its own types may be absent.
interface Chunk {
  timestamp: number
}
interface Frame {
  allocationSize(options: { format: 'RGBA' }): number
  copyTo(target: Uint8Array, options: { format: 'RGBA' }): Promise<unknown>
  close(): void
  readonly displayWidth: number
  readonly displayHeight: number
}
interface Demuxer {
  load(path: string): Promise<void>
  demuxAsync(): Promise<void>
  close(): void
  readonly duration: number | null
  readonly videoDecoderConfig: { codedWidth: number; codedHeight: number } | null
}
interface Decoder {
  configure(config: unknown): void
  decode(chunk: Chunk): void
  flush(): Promise<void>
  close(): void
  readonly decodeQueueSize: number
}
interface WebCodecs {
  Mp4Demuxer: new (init: { videoOutput: (chunk: Chunk) => void; error: (error: Error) => void }) => Demuxer
  VideoDecoder: new (init: { output: (frame: Frame) => void; error: (error: Error) => void }) => Decoder
}

/** Decoded frames waiting for conversion; each holds a full picture outside the JS heap. */
const maxWaiting = 16

let loading: Promise<WebCodecs | undefined> | undefined

function loadModule(): Promise<WebCodecs | undefined> {
  // A name in a variable keeps the compiler from demanding the optional package.
  const name = '@napi-rs/webcodecs'
  loading ??= import(name).then(
    (module: WebCodecs) => module,
    () => undefined,
  )
  return loading
}

interface Opened {
  module: WebCodecs
  chunks: Chunk[]
  /** Show times in µs, ascending. */
  times: number[]
  info: VideoInfo
  config: unknown
}

/** Packets stay compressed, so a whole clip's worth of them is small beside its frames. */
async function open(path: string): Promise<Opened> {
  const module = await loadModule()
  if (!module) {
    throw new PyraflowError('ERR_IO', {
      what: `reading video ${path}`,
      expected: 'ffmpeg, or the npm package @napi-rs/webcodecs',
      received: 'neither',
      remedy: 'install ffmpeg, or run npm install @napi-rs/webcodecs',
    })
  }
  await requireFile(path)
  const chunks: Chunk[] = []
  let failure: Error | undefined
  const demuxer = new module.Mp4Demuxer({
    videoOutput: (chunk) => void chunks.push(chunk),
    error: (error) => {
      failure ??= error
    },
  })
  try {
    await demuxer.load(path)
    await demuxer.demuxAsync()
    const config = demuxer.videoDecoderConfig
    if (failure) throw failure
    if (!config || chunks.length === 0) throw new Error('no video stream')
    // With B-frames the decoder hands out frames in show order under the times of decode order; sorted packet
    // times, given out one by one, are the right ones.
    const times = chunks.map((chunk) => Number(chunk.timestamp)).sort((a, b) => a - b)
    const span = times[times.length - 1] - times[0]
    const step = times.length > 1 ? span / (times.length - 1) : 40_000
    if ((demuxer.duration ?? 0) - span > 2.5 * step + 100_000) throw new Error('a file that ends early')
    const info = {
      width: config.codedWidth,
      height: config.codedHeight,
      fps: 1e6 / step,
      frames: times.length,
    }
    return { module, chunks, times, info, config }
  } catch (error) {
    throw clipError(path, (error as Error).message)
  } finally {
    demuxer.close()
  }
}

async function toRgb(frame: Frame, width: number, height: number): Promise<Uint8Array> {
  try {
    const rgba = new Uint8Array(frame.allocationSize({ format: 'RGBA' }))
    await frame.copyTo(rgba, { format: 'RGBA' })
    const raw = { width: frame.displayWidth, height: frame.displayHeight, channels: 4 as const }
    const image = sharp(rgba, { raw }).removeAlpha()
    return await image.resize(width, height, { fit: 'cover', kernel: 'lanczos3' }).raw().toBuffer()
  } finally {
    frame.close()
  }
}

/** How often frame `i` is shown at `fps`: 0 drops it. Follows ffmpeg's fps filter (nearest slot, later wins). */
function repeats(times: readonly number[], i: number, fps: number): number {
  const slot = (time: number): number => Math.round(((time - times[0]) * fps) / 1e6)
  if (i + 1 < times.length) return slot(times[i + 1]) - slot(times[i])
  const step = times.length > 1 ? (times[i] - times[0]) / (times.length - 1) : 0
  return Math.max(1, slot(times[i] + step) - slot(times[i]))
}

async function decode(path: string, options: DecodeOptions = {}): Promise<DecodedVideo> {
  checkDecodeOptions(options)
  const { fps, maxFrames = Number.POSITIVE_INFINITY, signal } = options
  const { module, chunks, times, info, config } = await open(path)
  const width = options.width ?? info.width
  const height = options.height ?? info.height
  const waiting: Frame[] = []
  const kept: Uint8Array[] = []
  let shown = 0
  let failure: Error | undefined
  const decoder = new module.VideoDecoder({
    output: (frame) => void waiting.push(frame),
    error: (error) => {
      failure ??= error
    },
  })
  const drain = async (): Promise<void> => {
    for (let frame = waiting.shift(); frame; frame = waiting.shift()) {
      const copies = fps ? repeats(times, shown, fps) : 1
      ++shown
      if (copies === 0 || kept.length >= maxFrames) {
        frame.close()
        continue
      }
      const rgb = await toRgb(frame, width, height)
      for (let k = 0; k < copies && kept.length < maxFrames; ++k) kept.push(rgb)
    }
  }
  try {
    decoder.configure(config)
    for (const chunk of chunks) {
      if (signal?.aborted) throw abortedError(`reading video ${path}`, signal.reason)
      if (kept.length >= maxFrames || failure) break
      decoder.decode(chunk)
      while (!failure && decoder.decodeQueueSize + waiting.length > maxWaiting) {
        await new Promise(setImmediate)
        await drain()
      }
    }
    if (kept.length < maxFrames && !failure) await decoder.flush()
    await drain()
    if (failure) throw failure
    if (kept.length < maxFrames && shown < chunks.length) throw new Error('frames that do not decode')
  } catch (error) {
    throw error instanceof PyraflowError ? error : clipError(path, (error as Error).message)
  } finally {
    for (const frame of waiting) frame.close()
    decoder.close()
  }
  const frames = new Uint8Array(kept.length * width * height * 3)
  for (const [i, rgb] of kept.entries()) frames.set(rgb, i * rgb.length)
  return { frames, width, height, fps: fps ?? info.fps, count: kept.length }
}

/**
 * Reads mp4 through the optional npm package `@napi-rs/webcodecs` where no ffmpeg program is installed. It only
 * decodes, does not turn rotated clips upright, and knows no container but mp4.
 */
export const webcodecsBackend: VideoBackend = {
  name: 'webcodecs',
  available: async () => (await loadModule()) !== undefined,
  probe: async (path) => (await open(path)).info,
  decode,
  encodeMp4: ffmpegBackend.encodeMp4,
}

/** ffmpeg if it is there, else the optional npm decoder; with neither, ffmpeg's errors say what to install. */
export async function videoBackend(): Promise<VideoBackend> {
  if (await hasFfmpeg()) return ffmpegBackend
  return (await webcodecsBackend.available()) ? webcodecsBackend : ffmpegBackend
}
