import { mkdir, mkdtemp, readdir, readFile, rm, stat, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, beforeAll, beforeEach, describe, expect, test, vi } from 'vitest'
import { caption, FPS, FRAMES, makeRng, randomSpec, renderClip, SIZE } from '../examples/shapes/world.ts'
import { ioError, writeAtomically } from '../lib/io/atomic.ts'
import { contactSheet } from '../lib/io/contact-sheet.ts'
import { frameDelays, loadImage, saveGif, savePng, saveVideo, saveWebp } from '../lib/io/image.ts'
import { decodeVideo, encodeMp4, hasFfmpeg, probeVideo } from '../lib/io/video.ts'
import { videoBackend, webcodecsBackend } from '../lib/io/webcodecs.ts'
import { type Dataset, openDataset, shuffle } from '../lib/train/dataset.ts'

const size = { width: SIZE, height: SIZE }
const options = { ...size, fps: FPS }
const spec = randomSpec(makeRng(1), 'train')
const clip = renderClip(spec)
let root = ''
let dir = ''

beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'pyraflow-io-'))
})
beforeEach(async () => {
  dir = await mkdtemp(join(root, 'case-'))
})
afterAll(() => rm(root, { recursive: true, force: true }))

function meanDifference(a: Uint8Array, b: Uint8Array): number {
  expect(a.length).toBe(b.length)
  let sum = 0
  for (let i = 0; i < a.length; ++i) sum += Math.abs(a[i] - b[i])
  return sum / a.length
}

const codeOf = (code: string, text: string | RegExp) =>
  expect.objectContaining({ code, message: expect.stringMatching(text) })

describe('pictures and animations', () => {
  test('an animated WebP keeps frames, size, timing and metadata', async () => {
    const path = join(dir, 'clip.webp')
    await saveWebp(path, clip, { ...options, metadata: { seed: '7' } })
    const { pages, width, pageHeight, delay, loop, exif } = await sharp(path, { animated: true }).metadata()
    expect({ pages, width, pageHeight, loop }).toEqual({
      pages: FRAMES,
      width: SIZE,
      pageHeight: SIZE,
      loop: 0,
    })
    expect(delay?.reduce((sum, ms) => sum + ms)).toBe(Math.round((FRAMES * 1000) / FPS))
    expect(exif?.toString('latin1')).toContain('"seed":"7"')
    const back = await sharp(path, { animated: true }).removeAlpha().raw().toBuffer()
    expect(meanDifference(back, clip)).toBeLessThan(3)
  })

  test('a GIF keeps all frames and its total length', async () => {
    const path = join(dir, 'clip.gif')
    await saveGif(path, clip, options)
    const { pages, delay } = await sharp(path, { animated: true }).metadata()
    expect(pages).toBe(FRAMES)
    expect(Math.abs((delay?.reduce((sum, ms) => sum + ms) ?? 0) - 1042)).toBeLessThanOrEqual(5)
    expect(frameDelays(3, 24, 10)).toEqual([40, 40, 50])
  })

  test('PNG frames are exact, and a shorter video leaves no frames of a longer one behind', async () => {
    const path = join(dir, 'frames')
    const bytes = SIZE * SIZE * 3
    await saveVideo(path, clip.subarray(0, 3 * bytes), options)
    await writeFile(join(path, 'notes.txt'), 'mine')
    await saveVideo(`${path}.png`, clip.subarray(bytes, 3 * bytes), options)
    expect((await readdir(path)).sort()).toEqual(['frame-00000.png', 'frame-00001.png', 'notes.txt'])
    expect(await loadImage(join(path, 'frame-00001.png'), size)).toEqual(clip.slice(2 * bytes, 3 * bytes))
  })

  test('a loaded picture covers the size and is cropped in the middle', async () => {
    const wide = new Uint8Array(8 * 4 * 3)
    for (let i = 0; i < 32; ++i) wide.set(i % 8 < 2 || i % 8 > 5 ? [255, 0, 0] : [0, 255, 0], i * 3)
    await savePng(join(dir, 'wide.png'), wide, { width: 8, height: 4 })
    const square = await loadImage(join(dir, 'wide.png'), { width: 4, height: 4 })
    expect(Array.from(square)).toEqual(Array.from({ length: 16 }, () => [0, 255, 0]).flat())
  })

  test('a missing picture and a text file are ERR_IO naming the file', async () => {
    await writeFile(join(dir, 'text.png'), 'no picture')
    await expect(loadImage(join(dir, 'none.png'), size)).rejects.toEqual(
      codeOf('ERR_IO', /none\.png.*ENOENT/),
    )
    await expect(loadImage(join(dir, 'text.png'), size)).rejects.toEqual(codeOf('ERR_IO', /text\.png/))
  })

  test('a contact sheet shows every clip, with any characters in its label', async () => {
    const path = join(dir, 'sheet.png')
    const label = `<${caption(spec)}> & "more"`
    const clips = [0, 1, 2].map(() => ({ frames: clip, ...size, label }))
    await contactSheet(path, clips, { columns: 2, framesPerClip: 4, frameHeight: 64 })
    const { width, height } = await sharp(path).metadata()
    expect({ width, height }).toEqual({ width: 2 * 4 + 2 * (4 * 68 + 4), height: 2 * 4 + 2 * (22 + 64 + 4) })
  })

  test('half a frame and an unknown ending are refused before anything is written', async () => {
    const half = clip.subarray(0, 1000)
    await expect(saveVideo(join(dir, 'a.webp'), half, options)).rejects.toEqual(
      codeOf('ERR_SHAPE', /1000 bytes/),
    )
    await expect(saveVideo(join(dir, 'a.avi'), clip, options)).rejects.toEqual(codeOf('ERR_OPTION', /\.avi/))
    expect(await readdir(dir)).toEqual([])
  })
})

describe('outputs that cannot be written', () => {
  test('a path through a file is ERR_IO naming it, for every format', async () => {
    await writeFile(join(dir, 'file'), '')
    for (const name of ['a.webp', 'a.gif', 'a.png', ...((await hasFfmpeg()) ? ['a.mp4'] : [])]) {
      const saved = saveVideo(join(dir, 'file', name), clip, options)
      await expect(saved, name).rejects.toEqual(codeOf('ERR_IO', /file.*(ENOTDIR|EEXIST).*choose another/))
    }
    expect(await readdir(dir)).toEqual(['file'])
  })

  test.skipIf(process.platform !== 'linux')(
    'a full disk is ERR_IO and leaves the earlier file alone',
    async () => {
      const path = join(dir, 'kept.bin')
      await writeFile(path, 'before')
      const full = writeAtomically(path, async (temporary) => {
        await writeFile(temporary, 'half')
        await writeFile('/dev/full', 'x')
      })
      await expect(full).rejects.toEqual(codeOf('ERR_IO', /kept\.bin.*ENOSPC.*disk space/))
      expect(await readFile(path, 'utf8')).toBe('before')
      expect(await readdir(dir)).toEqual(['kept.bin'])
      expect(ioError({ code: 'EROFS' }, 'writing', 'x').remedy).toMatch(/read-only/)
    },
  )
})

describe('mp4 through ffmpeg', () => {
  beforeEach(async (context) => {
    if (!(await hasFfmpeg())) context.skip('ffmpeg is not installed: install it to run the mp4 tests')
  })

  test('a clip survives the round trip in size, rate, length and colour', async () => {
    const path = join(dir, 'new folder', 'clip.mp4')
    await encodeMp4(path, clip, { ...options, metadata: { comment: '{"seed":7}' } })
    expect(await probeVideo(path)).toEqual({ ...size, fps: FPS, frames: FRAMES })
    const back = await decodeVideo(path)
    expect(back.count).toBe(FRAMES)
    expect(meanDifference(back.frames, clip)).toBeLessThan(2)
    expect(await readdir(join(dir, 'new folder'))).toEqual(['clip.mp4'])
    expect((await readFile(path)).toString('latin1')).toContain('{"seed":7}')
  })

  test('frames may arrive in pieces while the video is still being made', async () => {
    const path = join(dir, 'clip.mp4')
    async function* units(): AsyncGenerator<Uint8Array> {
      for (let at = 0; at < clip.length; at += 8 * SIZE * SIZE * 3) {
        await new Promise(setImmediate)
        yield clip.subarray(at, at + 8 * SIZE * SIZE * 3)
      }
    }
    await encodeMp4(path, units(), options)
    expect((await probeVideo(path)).frames).toBe(FRAMES)
  })

  test('decoding resamples, limits, scales and crops', async () => {
    const path = join(dir, 'clip.mp4')
    await encodeMp4(path, clip, options)
    const small = await decodeVideo(path, { width: 48, height: 32, fps: 12, maxFrames: 5 })
    expect({ ...small, frames: small.frames.length }).toEqual({
      frames: 5 * 48 * 32 * 3,
      width: 48,
      height: 32,
      fps: 12,
      count: 5,
    })
    expect((await decodeVideo(path, { fps: 12 })).count).toBe(13)
    await expect(decodeVideo(path, { width: 0 })).rejects.toEqual(codeOf('ERR_OPTION', /width.*received 0/))
  })

  test('what is decoded covers the size in whole and is cropped in the middle', async () => {
    const path = join(dir, 'wide.mp4')
    const wide = { width: 96, height: 36, fps: 8 }
    // Three vertical bars, of which a square in the middle shows the second alone.
    const frame = Uint8Array.from({ length: 96 * 36 * 3 }, (_, at) => {
      const x = Math.floor(at / 3) % 96
      return at % 3 === (x < 30 ? 0 : x < 66 ? 1 : 2) ? 200 : 20
    })
    await encodeMp4(path, [frame, frame, frame], wide)
    // With and without asking the file what it is first.
    for (const how of [{ fps: 8, maxFrames: 3 }, { maxFrames: 3 }]) {
      const { frames, count, fps } = await decodeVideo(path, { width: 24, height: 24, ...how })
      expect([count, fps, frames.length]).toEqual([3, 8, 3 * 24 * 24 * 3])
      const far = frames.reduce((n, v, at) => n + Number(Math.abs(v - (at % 3 === 1 ? 200 : 20)) > 12), 0)
      // The borders of the bars are where cropping cuts.
      expect(far / frames.length).toBeLessThan(0.1)
    }
  })

  test('a missing, an empty, an unreadable and a truncated clip are each ERR_IO naming the file', async () => {
    const path = join(dir, 'cut.mp4')
    await encodeMp4(path, clip, options)
    await truncate(path, Math.floor((await stat(path)).size * 0.7))
    await writeFile(join(dir, 'text.mp4'), 'this is no video '.repeat(100))
    await writeFile(join(dir, 'empty.mp4'), '')
    for (const name of ['none', 'empty', 'text', 'cut']) {
      for (const how of [{}, { width: 48, height: 32, fps: 12, maxFrames: 50 }]) {
        const decoded = decodeVideo(join(dir, `${name}.mp4`), how)
        await expect(decoded, name).rejects.toEqual(codeOf('ERR_IO', new RegExp(`${name}\\.mp4`)))
      }
    }
  })

  test('odd sizes and half frames are refused and leave nothing behind', async () => {
    const path = join(dir, 'odd.mp4')
    const odd = encodeMp4(path, clip, { width: 3, height: 4, fps: 8 })
    await expect(odd).rejects.toEqual(codeOf('ERR_OPTION', /even.*3×4/))
    await expect(encodeMp4(path, clip.subarray(0, 100), options)).rejects.toEqual(
      codeOf('ERR_SHAPE', /100 bytes/),
    )
    expect(await readdir(dir)).toEqual([])
  })

  test('an abort stops the encoder at once and leaves nothing behind', async () => {
    const stop = new AbortController()
    async function* endless(): AsyncGenerator<Uint8Array> {
      for (let i = 0; ; ++i) {
        if (i === 3) stop.abort()
        await new Promise((resolve) => setTimeout(resolve, 5))
        yield clip
      }
    }
    const encoded = encodeMp4(join(dir, 'a.mp4'), endless(), { ...options, signal: stop.signal })
    await expect(encoded).rejects.toEqual(codeOf('ERR_ABORTED', ''))
    expect(await readdir(dir)).toEqual([])
  })

  test('a missing ffmpeg program is ERR_IO saying how to get it', async () => {
    vi.stubEnv('PYRAFLOW_FFMPEG', join(dir, 'no-ffmpeg'))
    try {
      expect(await hasFfmpeg()).toBe(false)
      const encoded = encodeMp4(join(dir, 'a.mp4'), clip, options)
      await expect(encoded).rejects.toEqual(codeOf('ERR_IO', /install ffmpeg/))
      expect(await readdir(dir)).toEqual([])
    } finally {
      vi.unstubAllEnvs()
    }
  })
})

describe('mp4 through the optional npm decoder', () => {
  beforeEach(async (context) => {
    const reason = 'needs ffmpeg to write a clip and @napi-rs/webcodecs to read it'
    if (!(await hasFfmpeg()) || !(await webcodecsBackend.available())) context.skip(reason)
  })

  test('gives the same frames as ffmpeg, also resampled and cropped', async () => {
    const path = join(dir, 'clip.mp4')
    await encodeMp4(path, clip, options)
    for (const how of [{}, { fps: 12 }, { fps: 30, maxFrames: 20 }, { width: 64, height: 32 }]) {
      const [ours, theirs] = [await webcodecsBackend.decode(path, how), await decodeVideo(path, how)]
      expect(ours.count).toBe(theirs.count)
      expect(meanDifference(ours.frames, theirs.frames)).toBeLessThan(2)
    }
  })

  test('says which clip is unreadable or truncated', async () => {
    const path = join(dir, 'cut.mp4')
    await encodeMp4(path, clip, options)
    await truncate(path, Math.floor((await stat(path)).size * 0.7))
    await writeFile(join(dir, 'text.mp4'), 'this is no video '.repeat(100))
    for (const name of ['none', 'text', 'cut']) {
      const decoded = webcodecsBackend.decode(join(dir, `${name}.mp4`))
      await expect(decoded, name).rejects.toEqual(codeOf('ERR_IO', new RegExp(`${name}\\.mp4`)))
    }
  })
})

test('the video backend is ffmpeg wherever it is installed', async () => {
  if (await hasFfmpeg()) expect((await videoBackend()).name).toBe('ffmpeg')
  vi.stubEnv('PYRAFLOW_FFMPEG', join(dir, 'no-ffmpeg'))
  const { name } = await videoBackend()
  vi.unstubAllEnvs()
  expect(name).toBe((await webcodecsBackend.available()) ? 'webcodecs' : 'ffmpeg')
})

describe('a data set', () => {
  const wanted = { width: 32, height: 32, frames: 9 }

  async function folder(lines: string[], clips = ['a.mp4']): Promise<string> {
    await mkdir(join(dir, 'clips'))
    for (const name of clips) await writeFile(join(dir, 'clips', name), 'never decoded')
    await writeFile(join(dir, 'clips', 'captions.jsonl'), lines.join('\n'))
    return join(dir, 'clips')
  }

  test.each([
    ['not JSON', '{"video": "a.mp4", "text": ', /captions\.jsonl:2.*not JSON/],
    ['not an object', '[1]', /captions\.jsonl:2/],
    ['without a video', '{"text": "x"}', /captions\.jsonl:2.*"video"/],
    ['with an empty caption', '{"video": "a.mp4", "text": " "}', /captions\.jsonl:2.*empty "text"/],
    ['with a missing clip', '{"video": "b.mp4", "text": "x"}', /captions\.jsonl:2.*b\.mp4/],
  ])('rejects a caption line %s, naming file and line', async (_, line, message) => {
    const path = await folder(['{"video": "a.mp4", "text": "fine"}', line])
    await expect(openDataset(path, wanted)).rejects.toEqual(codeOf('ERR_IO', message))
  })

  test('rejects a folder without captions and captions without lines', async () => {
    await expect(openDataset(dir, wanted)).rejects.toEqual(
      codeOf('ERR_IO', /captions\.jsonl with a line.*\.txt/),
    )
    await expect(openDataset(await folder(['', ' ']), wanted)).rejects.toEqual(
      codeOf('ERR_IO', /no caption lines/),
    )
  })

  test('visits every clip once an epoch in an order given by seed and epoch alone', async () => {
    const names = Array.from({ length: 10 }, (_, i) => `${i}.mp4`)
    const lines = names.map((video, i) => JSON.stringify({ video, text: `clip ${i}`, speed: i }))
    const data = await openDataset(await folder(lines, names), {
      ...wanted,
      short: 'repeat',
      backend: fakeBackend(),
    })
    expect(data.length).toBe(10)
    expect(data.item(3)).toMatchObject({ text: 'clip 3', extra: { speed: 3 } })
    expect(() => data.item(10)).toThrow(/0 to 9, received 10/)
    const first = await collect(data, { batchSize: 3, seed: 1, epoch: 0 })
    expect(await collect(data, { batchSize: 3, seed: 1, epoch: 0 })).toEqual(first)
    expect(await collect(data, { batchSize: 3, seed: 1, epoch: 0, skip: 2 })).toEqual(first.slice(2))
    expect(await collect(data, { batchSize: 3, seed: 1, epoch: 1 })).not.toEqual(first)
    expect(new Set(first.flat()).size).toBe(9)
    expect(Array.from(shuffle(1000, 9)).sort((a, b) => a - b)).toEqual(
      Array.from({ length: 1000 }, (_, i) => i),
    )
    const batch = data.batches({ batchSize: 11, seed: 1, epoch: 0 }).next()
    await expect(batch).rejects.toEqual(codeOf('ERR_OPTION', /1 to 10.*received 11/))
  })

  test('repeats short clips up to the wanted number of frames', async () => {
    const data = await openDataset(await folder(['{"video": "a.mp4", "text": "x"}']), {
      ...wanted,
      short: 'repeat',
      backend: fakeBackend(),
    })
    const frames = await data.load(0)
    const bytes = 32 * 32 * 3
    const values = Array.from({ length: 9 }, (_, t) => frames[t * bytes + 5])
    expect(values).toEqual([0, 1, 2, 3, 0, 1, 2, 3, 0])
  })

  test('decodes real clips when ffmpeg is there', async (context) => {
    if (!(await hasFfmpeg())) return context.skip('ffmpeg is not installed')
    await encodeMp4(join(dir, 'a.mp4'), clip, options)
    await writeFile(join(dir, 'list.jsonl'), `{"video": "a.mp4", "text": "${caption(spec)}"}\n`)
    const data = await openDataset(join(dir, 'list.jsonl'), { ...wanted, frames: 17 })
    for await (const batch of data.batches({ batchSize: 1, seed: 0, epoch: 0 })) {
      expect(batch.text).toEqual([caption(spec)])
      expect(batch.frames).toHaveLength(17 * 32 * 32 * 3)
    }
  })
})

/** Clips of four flat frames whose values are their numbers: data set logic needs no decoder. */
function fakeBackend() {
  const info = { width: 32, height: 32, fps: 8 }
  const frames = Uint8Array.from({ length: 4 * 32 * 32 * 3 }, (_, i) => Math.floor(i / (32 * 32 * 3)))
  return {
    name: 'fake',
    available: async () => true,
    probe: async () => ({ ...info, frames: 4 }),
    decode: async () => ({ ...info, frames, count: 4 }),
    encodeMp4: async () => {},
  }
}

async function collect(data: Dataset, batching: Parameters<Dataset['batches']>[0]): Promise<number[][]> {
  const seen: number[][] = []
  for await (const { indices } of data.batches(batching)) seen.push(indices)
  return seen
}
