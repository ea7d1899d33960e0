import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { loadImage } from '../lib/io/image.ts'
import { ahead } from '../lib/train/ahead.ts'
import type { BadItem } from '../lib/train/bad-items.ts'
import { type ClipInfo, chooseBucket } from '../lib/train/buckets.ts'
import { type Dataset, openDataset } from '../lib/train/dataset.ts'
import { makePicture } from './fixtures/clips.ts'
import { FakeVideo } from './fixtures/tiny.ts'

const root = mkdtempSync(join(tmpdir(), 'pyraflow-data-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))

const SIZE = { width: 32, height: 32, frames: 9 }
const line = (video: string, text = 'a caption'): string => JSON.stringify({ video, text })

/** A folder with these files, whose bytes are their names, and these lines of captions.jsonl. */
function folder(files: readonly string[], lines?: readonly string[]): string {
  const dir = mkdtempSync(join(root, 'set-'))
  for (const name of files) {
    mkdirSync(join(dir, name, '..'), { recursive: true })
    writeFileSync(join(dir, name), name.endsWith('.txt') ? `the text of ${name}` : name)
  }
  if (lines) writeFileSync(join(dir, 'captions.jsonl'), lines.join('\n'))
  return dir
}

/** The fake decoder, whose clips are as their names say: `64x32x17@8.mp4`. */
function named(): FakeVideo {
  const backend = new FakeVideo(64, 9)
  const of = (path: string): { width: number; height: number; frames: number; fps: number } => {
    if (path.includes('broken')) throw Object.assign(new Error('broken'), { code: 'ERR_IO' })
    const [, width, height, frames, fps] = (/(\d+)x(\d+)x(\d+)@(\d+)/.exec(path) ?? ['', 64, 64, 9, 8]).map(
      Number,
    )
    return { width, height, frames, fps } as never
  }
  backend.probe = async (path) => of(path)
  const decode = backend.decode.bind(backend)
  backend.decode = async (path, options = {}) => {
    if (path.includes('broken')) return await decode(path)
    const { frames, fps } = of(path)
    const count = Math.round((frames * (options.fps ?? fps)) / fps)
    return await decode(path, { ...options, maxFrames: Math.min(count, options.maxFrames ?? count) })
  }
  return backend
}
const items = (data: Dataset): string[] => Array.from({ length: data.length }, (_, i) => data.item(i).name)

describe('a list of clips', () => {
  test('may be text files beside clips and pictures, in subfolders too', async () => {
    const files = ['b.mp4', 'b.txt', 'a/c.webm', 'a/c.txt', 'p.png', 'p.txt', 'notes.txt', '.hidden.mp4']
    const dir = folder(files)
    const buckets = [SIZE, { width: 32, height: 32, frames: 1 }]
    await makePicture(join(dir, 'p.png'))
    const data = await openDataset(dir, { buckets, backend: named() })
    expect(items(data)).toEqual([join('a', 'c.webm'), 'b.mp4', 'p.png'])
    expect([0, 1, 2].map((i) => data.item(i).kind)).toEqual(['video', 'video', 'image'])
    expect([0, 1, 2].map((i) => data.bucketOf(i))).toEqual([0, 0, 1])
    expect(data.item(1)).toMatchObject({ text: 'the text of b.txt', path: join(dir, 'b.mp4') })
    expect(await data.load(2)).toEqual(await loadImage(join(dir, 'p.png'), SIZE))
  })

  test('may begin with a byte order mark and have Windows line ends', async () => {
    const dir = folder(['0.mp4', '1.mp4'], [`\uFEFF${line('0.mp4')}\r`, '\r', `${line('1.mp4')}\r`])
    expect(items(await openDataset(dir, { ...SIZE, backend: named() }))).toEqual(['0.mp4', '1.mp4'])
  })

  test('refuses sizes that are none, or given twice', async () => {
    const dir = folder(['0.mp4'], [line('0.mp4')])
    for (const buckets of [[], [SIZE, SIZE], [{ ...SIZE, frames: 0 }], [{ ...SIZE, width: 1.5 }]]) {
      await expect(openDataset(dir, { buckets, backend: named() })).rejects.toMatchObject({
        code: 'ERR_OPTION',
      })
    }
  })
})

describe('entries that cannot be used', () => {
  const good = ['0.mp4', '1.mp4', '2.mp4']
  const bad: [BadItem['reason'], string, RegExp][] = [
    ['line', '{', /captions\.jsonl:2.*not JSON/],
    ['line', '{"text": "x"}', /captions\.jsonl:2.*no "video" or "image"/],
    ['line', '{"video": "0.mp4", "image": "p.png", "text": "x"}', /captions\.jsonl:2.*both/],
    ['caption', line('0.mp4', ' '), /captions\.jsonl:2.*empty "text" for 0\.mp4/],
    ['missing', line('none.mp4'), /captions\.jsonl:2.*none\.mp4/],
    ['bucket', '{"image": "1.mp4", "text": "x"}', /picture .*1\.mp4.*a bucket of one frame/],
  ]
  for (const [reason, entry, message] of bad) {
    test(`are named, counted and left out if that is allowed: ${entry}`, async () => {
      const dir = folder(good, [line('0.mp4'), entry, line('2.mp4')])
      const how = { ...SIZE, backend: named() }
      for (const onBad of [undefined, 'fail', { limit: 0 }] as const) {
        await expect(openDataset(dir, { ...how, onBad })).rejects.toMatchObject({
          code: 'ERR_IO',
          message: expect.stringMatching(message),
        })
      }
      for (const onBad of ['skip', { limit: 1 }] as const) {
        const heard: BadItem[] = []
        const data = await openDataset(dir, { ...how, onBad, onBadItem: (item) => heard.push(item) })
        expect(items(data)).toEqual(['0.mp4', '2.mp4'])
        expect(heard).toMatchObject([{ reason, error: { message: expect.stringMatching(message) } }])
        expect(data.bad).toEqual(heard)
      }
    })
  }

  test('are too many beyond the limit, whichever way they are found', async () => {
    const lines = [line('0.mp4'), '{', line('broken.mp4'), line('2.mp4')]
    const dir = folder([...good, 'broken.mp4'], lines)
    const quiet = { ...SIZE, backend: named(), onBadItem: () => undefined }
    const data = await openDataset(dir, { ...quiet, onBad: { limit: 1 } })
    const batches = async (): Promise<void> => {
      for await (const batch of data.batches({ batchSize: 3, seed: 1, epoch: 0 })) void batch
    }
    await expect(batches()).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/at most 1 entries.*another one: .*broken\.mp4.*doctor data/),
    })
    expect(data.bad.map(({ reason }) => reason)).toEqual(['line'])
    await expect(openDataset(dir, { ...quiet, onBad: { limit: -1 } })).rejects.toMatchObject({
      code: 'ERR_OPTION',
    })
    const none = folder(good, ['{', '['])
    await expect(openDataset(none, { ...quiet, onBad: 'skip' })).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringContaining('2 that were left out'),
    })
  })

  test('are missing from their batch, whose others stay, and are not tried again', async () => {
    const names = ['0.mp4', 'broken.mp4', '2.mp4', '3.mp4']
    const dir = folder(
      names,
      names.map((name) => line(name)),
    )
    const backend = named()
    const heard: BadItem[] = []
    const how = { ...SIZE, onBad: 'skip', onBadItem: (item: BadItem) => heard.push(item) } as const
    const data = await openDataset(dir, { ...how, backend })
    const seen: number[][] = []
    for await (const { indices, frames, text } of data.batches({
      batchSize: 2,
      seed: 3,
      epoch: 0,
      epochs: 3,
    })) {
      seen.push(indices)
      expect(frames).toHaveLength(indices.length * 9 * 32 * 32 * 3)
      expect(text).toHaveLength(indices.length)
      for (const [k, i] of indices.entries()) {
        const clip = await data.load(i)
        expect(frames.subarray(k * clip.length, (k + 1) * clip.length)).toEqual(clip)
      }
    }
    expect(seen).toHaveLength(6)
    for (const epoch of [0, 1, 2]) {
      expect(
        seen
          .slice(2 * epoch, 2 * epoch + 2)
          .flat()
          .sort(),
      ).toEqual([0, 2, 3])
      const order = [0, 1].flatMap((k) => data.batchIndices(k, { batchSize: 2, seed: 3, epoch }))
      expect(seen.slice(2 * epoch, 2 * epoch + 2).flat()).toEqual(order.filter((i) => i !== 1))
    }
    expect(heard).toMatchObject([{ reason: 'unreadable', place: join(dir, 'broken.mp4') }])
    const alone = data.batches({ batchSize: 1, seed: 3, epoch: 0 })
    const all = async (): Promise<void> => {
      for await (const batch of alone) void batch
    }
    await expect(all()).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringContaining('broken.mp4'),
    })
  })

  test('are also clips that turn out shorter than their container says', async () => {
    const dir = folder(['64x64x5@8.mp4', '0.mp4'], [line('64x64x5@8.mp4'), line('0.mp4')])
    const how = { ...SIZE, backend: named() }
    const strict = await openDataset(dir, how)
    await expect(strict.load(0)).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/64x64x5@8\.mp4: expected at least 9 frames, received 5.*repeat/),
    })
    const repeated = await (await openDataset(dir, { ...how, short: 'repeat' })).load(0)
    const bytes = 32 * 32 * 3
    expect(repeated).toHaveLength(9 * bytes)
    expect(repeated.subarray(5 * bytes)).toEqual(repeated.subarray(0, 4 * bytes))
    const heard: BadItem[] = []
    const lenient = await openDataset(dir, { ...how, onBad: 'skip', onBadItem: (item) => heard.push(item) })
    for await (const { indices } of lenient.batches({ batchSize: 2, seed: 1, epoch: 0 }))
      expect(indices).toEqual([1])
    expect(heard).toMatchObject([{ reason: 'short' }])
  })
})

describe('buckets', () => {
  const clip = (width: number, height: number, frames: number, fps = 24): ClipInfo => ({
    kind: 'video',
    width,
    height,
    frames,
    fps,
  })
  const BUCKETS = [
    { width: 640, height: 384, frames: 121 },
    { width: 640, height: 384, frames: 49 },
    { width: 384, height: 640, frames: 49 },
    { width: 1280, height: 768, frames: 49 },
    { width: 512, height: 512, frames: 1 },
  ]
  const chosen = (info: ClipInfo, fps?: number): string => {
    const { index, shortest } = chooseBucket(info, BUCKETS, fps)
    const b = BUCKETS[index] as (typeof BUCKETS)[number]
    return `${b.width}x${b.height}x${b.frames}${shortest === undefined ? '' : ' short'}`
  }

  test.each([
    ['the longest that it fills', clip(854, 480, 200), undefined, '640x384x121'],
    ['a shorter one', clip(854, 480, 120), undefined, '640x384x49'],
    ['the largest that needs no enlarging', clip(1920, 1080, 200), undefined, '1280x768x49'],
    ['the smallest where all would be enlarged', clip(320, 180, 60), undefined, '640x384x49'],
    ['the nearest ratio', clip(400, 700, 400), undefined, '384x640x49'],
    ['the length after resampling', clip(854, 480, 200, 60), 24, '640x384x49'],
    ['the shortest, and is too short for it', clip(854, 480, 30), undefined, '640x384x49 short'],
    ['one for pictures', { ...clip(854, 480, 1), kind: 'image' } as ClipInfo, 24, '512x512x1'],
  ])('a clip goes into %s', (_, info, fps, expected) => {
    expect(chosen(info, fps)).toBe(expected)
  })

  test('a clip too short for all of them cannot be used, or is repeated', async () => {
    const names = ['64x32x20@8.mp4', '64x32x4@8.mp4', '32x64x9@8.mp4']
    const dir = folder(
      names,
      names.map((name) => line(name)),
    )
    const buckets = [
      { width: 64, height: 32, frames: 17 },
      { width: 64, height: 32, frames: 9 },
      { width: 32, height: 64, frames: 9 },
    ]
    await expect(openDataset(dir, { buckets, backend: named() })).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/64x32x4@8\.mp4: expected at least 9 frames, received 4/),
    })
    const data = await openDataset(dir, { buckets, backend: named(), short: 'repeat' })
    expect([0, 1, 2].map((i) => data.bucketOf(i))).toEqual([0, 1, 2])
    expect(await data.load(0)).toHaveLength(17 * 64 * 32 * 3)
    expect(await data.load(2)).toHaveLength(9 * 64 * 32 * 3)
    const batch = data.batches({ batchSize: 1, seed: 0, epoch: 0 }).next()
    await expect(batch).rejects.toMatchObject({
      code: 'ERR_OPTION',
      message: expect.stringMatching(/one size.*64×32×17, 64×32×9, 32×64×9/),
    })
  })

  test('opening that looks into files can be stopped, and says how far it is', async () => {
    const names = Array.from({ length: 9 }, (_, i) => `${i}.mp4`)
    const dir = folder(
      names,
      names.map((name) => line(name)),
    )
    const buckets = [SIZE, { ...SIZE, frames: 17 }]
    const seen: string[] = []
    await openDataset(dir, { buckets, backend: named(), onProgress: (n, all) => seen.push(`${n}/${all}`) })
    expect(seen).toEqual(names.map((_, i) => `${i + 1}/9`))
    const stop = new AbortController()
    const stopped = openDataset(dir, {
      buckets,
      backend: named(),
      signal: stop.signal,
      onProgress: () => stop.abort(),
    })
    await expect(stopped).rejects.toMatchObject({ code: 'ERR_ABORTED' })
  })
})

describe('loading ahead', () => {
  const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms))

  test('keeps the order, and runs and holds no more than it may', async () => {
    let [running, most, begun, taken, held] = [0, 0, 0, 0, 0]
    const load = async (i: number): Promise<number> => {
      most = Math.max(most, ++running)
      held = Math.max(held, ++begun - taken)
      await pause(i % 3 === 0 ? 8 : 1)
      running--
      return i
    }
    const seen: number[] = []
    for await (const i of ahead(20, load, { parallel: 3, hold: 5 })) {
      taken++
      seen.push(i)
      await pause(2)
    }
    expect(seen).toEqual(Array.from({ length: 20 }, (_, i) => i))
    expect(most).toBe(3)
    // The one that the caller works on was taken out before it could be counted.
    expect(held).toBeLessThanOrEqual(6)
    expect(held).toBeGreaterThan(3)
  })

  test('goes on while the caller works, so that nobody waits for a loader that is fast enough', async () => {
    const load = (i: number): Promise<number> => pause(20).then(() => i)
    let waited = 0
    let last = 0
    for await (const i of ahead(12, load, { parallel: 2, hold: 4 })) {
      if (i > 0) waited += performance.now() - last
      await pause(25)
      last = performance.now()
    }
    // Alone it would be 11 · 20 ms.
    expect(waited).toBeLessThan(110)
  })

  test('stops the others when one fails, in its turn, and when the caller leaves', async () => {
    const stopped: number[] = []
    const load = (i: number, signal: AbortSignal): Promise<number> =>
      new Promise((resolve, reject) => {
        signal.addEventListener('abort', () => stopped.push(i))
        if (i < 2) resolve(i)
        else if (i === 2) reject(new Error('the third'))
      })
    const seen: number[] = []
    const all = async (): Promise<void> => {
      for await (const i of ahead(Number.POSITIVE_INFINITY, load, { parallel: 4, hold: 4 })) seen.push(i)
    }
    await expect(all()).rejects.toThrow('the third')
    expect(seen).toEqual([0, 1])
    expect(stopped).toContain(3)
    stopped.length = 0
    for await (const _ of ahead(9, load, { parallel: 9, hold: 9 })) break
    expect(stopped).toContain(8)
  })
})
