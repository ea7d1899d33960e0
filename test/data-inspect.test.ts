import { spawnSync } from 'node:child_process'
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { hasFfmpeg } from '../lib/io/video.ts'
import { findBars } from '../lib/train/black-bars.ts'
import { openDataset } from '../lib/train/dataset.ts'
import { type DatasetReport, type InspectOptions, inspectDataset } from '../lib/train/inspect.ts'
import { encodeLatents } from '../lib/train/latent-cache.ts'
import { makeDataset } from './fixtures/clips.ts'
import { commandLine } from './fixtures/compiled.ts'
import { FakeVideo, tinyVae } from './fixtures/tiny.ts'
import { live } from './gradcheck.ts'

const root = mkdtempSync(join(tmpdir(), 'pyraflow-doctor-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))

const ffmpeg = await hasFfmpeg()
if (!ffmpeg) console.log('ffmpeg is not installed: the tests with real clips are not run')
const BUCKETS = [
  { width: 64, height: 48, frames: 9 },
  { width: 48, height: 64, frames: 9 },
  { width: 32, height: 32, frames: 1 },
]
const dir = join(root, 'clips')
const line = (file: string, text = `about ${file}`): string =>
  JSON.stringify({ [file.endsWith('.png') ? 'image' : 'video']: file, text })

/** A data set in which everything is wrong once, beside what is right. */
beforeAll(async () => {
  if (!ffmpeg) return
  const wide = { width: 96, height: 72 }
  await makeDataset(dir, {
    'good.mp4': { ...wide, seed: 1 },
    'tall.mp4': { width: 72, height: 96, seed: 2 },
    'fast.mp4': { ...wide, seed: 3, fps: 16 },
    'short.mp4': { ...wide, seed: 4, frames: 6 },
    'small.mp4': { width: 32, height: 24, seed: 5 },
    'bars.mp4': { ...wide, seed: 6, bars: 10 },
    'cut.mp4': { ...wide, seed: 7 },
    'picture.png': { ...wide, seed: 8 },
  })
  truncateSync(join(dir, 'cut.mp4'), Math.floor(readFileSync(join(dir, 'cut.mp4')).length * 0.6))
  copyFileSync(join(dir, 'good.mp4'), join(dir, 'again.mp4'))
  writeFileSync(join(dir, 'text.mp4'), 'no film')
  const files = ['good', 'tall', 'fast', 'short', 'small', 'bars', 'cut', 'again', 'text', 'none']
  const lines = [...files.map((name) => line(`${name}.mp4`)), line('picture.png'), line('good.mp4', ' '), '{']
  writeFileSync(join(dir, 'captions.jsonl'), lines.join('\n'))
})

/** `kind place` of what was found, places without folder. */
const found = ({ findings }: DatasetReport, folder = dir): string[] =>
  findings.map(({ severity, kind, place }) => `${severity} ${kind} ${place.replace(`${folder}/`, '')}`)

describe.skipIf(!ffmpeg)('looking at a data set', () => {
  test('finds what cannot be used and what looks wrong, and foretells the cache', async () => {
    const progress: string[] = []
    const onProgress = (done: number, all: number): void => void progress.push(`${done}/${all}`)
    const vae = tinyVae()
    const report = await inspectDataset(dir, { buckets: BUCKETS, vae, onProgress })
    expect(found(report)).toEqual([
      'warning fps captions.jsonl:3',
      'error short captions.jsonl:4',
      'warning upscaled captions.jsonl:5',
      'warning bars captions.jsonl:6',
      'error unreadable captions.jsonl:7',
      'warning duplicate captions.jsonl:8',
      'error unreadable captions.jsonl:9',
      'error missing captions.jsonl:10',
      'error caption captions.jsonl:12',
      'error line captions.jsonl:13',
    ])
    expect(progress.at(-1)).toBe('13/13')
    const message = (kind: string): string => report.findings.find((f) => f.kind === kind)?.message as string
    expect(message('fps')).toMatch(/fast\.mp4 has 16 fps, most clips 8/)
    expect(message('short')).toMatch(/short\.mp4.*at least 9 frames, received 6/)
    expect(message('upscaled')).toMatch(/small\.mp4 is 32×24.*64×48/)
    expect(message('bars')).toMatch(/bars\.mp4 has black bars: about (9|10|11) top, (9|10|11) bottom/)
    expect(message('duplicate')).toMatch(/again\.mp4 has the bytes of good\.mp4 and another caption/)
    expect(report).toMatchObject({
      entries: 13,
      usable: { videos: 6, images: 1 },
      errors: 6,
      warnings: 4,
      buckets: [{ clips: 5 }, { clips: 1 }, { clips: 1 }],
    })
    expect(report.rates[0]).toMatchObject({ fps: 8 })

    // What was projected is what encoding then makes.
    const quiet = { onBad: 'skip', onBadItem: () => undefined } as const
    const data = await openDataset(dir, { buckets: BUCKETS, ...quiet })
    const done = await encodeLatents(vae, data, join(root, 'latents'))
    vae.dispose()
    expect(done.clips).toBe(report.usable.videos + report.usable.images)
    expect(done.bad.map(({ reason }) => reason).sort()).toEqual([
      ...['caption', 'line', 'missing', 'short', 'unreadable', 'unreadable'],
    ])
    expect(report.cache?.bytes).toBe(done.bytes)
    expect(report.encoding?.seconds).toBeGreaterThan(0)
    expect(report.encoding?.how).toMatch(/64×48×9, 48×64×9, 32×32×1 was encoded on this machine/)
    expect(await live()).toBe(0)
  }, 120_000)

  test('on the command line exits 1 with errors, 0 with warnings, and speaks JSON', () => {
    const run = (...args: string[]) =>
      spawnSync(process.execPath, [commandLine(), 'doctor', 'data', ...args], { encoding: 'utf8' })
    const bad = run(dir, '--bucket', '64x48x9', '--bucket', '48x64x9', '--limit', '4')
    expect(bad.stderr).toMatch(/1 errors, 1 warnings/)
    expect(bad.status).toBe(1)
    expect(bad.stdout).toMatch(/^error +short +.*short\.mp4/m)
    expect(bad.stdout).toMatch(/^bucket +64×48×9: 2$/m)
    const good = run(dir, '--limit', '1', '--width', '64', '--height', '48', '--frames', '9', '--json')
    expect(good.status).toBe(0)
    expect(JSON.parse(good.stdout)).toMatchObject({ entries: 1, errors: 0, buckets: [{ clips: 1 }] })
    expect(run(dir, '--width', '64').status).toBe(2)
    expect(run(dir, '--bucket', '64').status).toBe(2)
  }, 120_000)
})

describe('looking at a data set whose clips a fake decoder knows', () => {
  const fakes = join(root, 'fakes')
  const backend = new FakeVideo(64, 9)
  // `1-16fps.mp4` has 16 frames a second, the others 8.
  backend.probe = async (path: string) => {
    const fps = Number(/(\d+)fps/.exec(path)?.[1] ?? 8)
    return { width: 64, height: 64, fps, frames: 9 }
  }
  const names = ['0.mp4', '1-16fps.mp4', '2.mp4', '3-4fps.mp4']
  beforeAll(() => {
    mkdirSync(fakes)
    for (const name of names) writeFileSync(join(fakes, name), name)
    writeFileSync(join(fakes, 'captions.jsonl'), names.map((name) => line(name)).join('\n'))
  })
  const look = async (options: InspectOptions): Promise<string[]> =>
    found(await inspectDataset(fakes, { backend, ...options }), fakes)

  test('judges rates by the commonest, or the one that is asked for, and lengths after resampling', async () => {
    expect(await look({})).toEqual(['warning fps captions.jsonl:2', 'warning fps captions.jsonl:4'])
    const buckets = [{ width: 32, height: 32, frames: 9 }]
    // Nine frames at 16 a second are five at 8; at 4 a second they are 18.
    expect(await look({ fps: 8, buckets })).toEqual([
      'error short captions.jsonl:2',
      'warning fps captions.jsonl:4',
    ])
    expect(await look({ fps: 8, buckets, short: 'repeat' })).toEqual(['warning fps captions.jsonl:4'])
  })

  test('without sizes judges neither length nor size, and projects nothing', async () => {
    const report = await inspectDataset(fakes, { backend, limit: 1 })
    expect(report).toMatchObject({ entries: 1, findings: [], buckets: [], cache: null, encoding: null })
  })

  test('ends at an abort, and without a data set', async () => {
    const stop = new AbortController()
    const aborted = inspectDataset(fakes, { backend, signal: stop.signal, onProgress: () => stop.abort() })
    await expect(aborted).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    await expect(inspectDataset(join(root, 'nowhere'))).rejects.toMatchObject({ code: 'ERR_IO' })
    mkdirSync(join(root, 'empty'))
    await expect(inspectDataset(join(root, 'empty'))).rejects.toMatchObject({ code: 'ERR_IO' })
    await expect(inspectDataset(fakes, { buckets: [] })).rejects.toMatchObject({ code: 'ERR_OPTION' })
  })
})

describe('black bars', () => {
  const size = { width: 80, height: 60, count: 4 }

  /** Frames of a level that each pixel has. */
  function frames(level: (y: number, x: number, t: number) => number): Uint8Array {
    const all = new Uint8Array(size.count * size.height * size.width * 3)
    for (let i = 0; i < all.length / 3; i++) {
      const [x, y] = [i % size.width, Math.floor(i / size.width) % size.height]
      all.fill(level(y, x, Math.floor(i / (size.width * size.height))), 3 * i, 3 * i + 3)
    }
    return all
  }
  const none = { top: 0, bottom: 0, left: 0, right: 0 }
  const within = (v: number, from: number, to: number): boolean => v >= from && v < to

  test.each([
    ['above and below', { ...none, top: 8, bottom: 6 }],
    ['left and right', { ...none, left: 10, right: 12 }],
    ['on all sides', { top: 5, bottom: 5, left: 9, right: 9 }],
  ])('%s are measured, also when they are not quite black', (_, bars) => {
    const { top, bottom, left, right } = bars
    const lit = frames((y, x) =>
      within(y, top, size.height - bottom) && within(x, left, size.width - right) ? 90 : (x * y) % 20,
    )
    expect(findBars(lit, size)).toEqual(bars)
  })

  test.each([
    ['a picture without any', () => 90],
    ['nothing but black', () => 3],
    ['a ball before a black ground', (y: number, x: number) => (Math.hypot(y - 30, x - 40) < 12 ? 200 : 0)],
    [
      'a box before a black ground',
      (y: number, x: number) => (Math.abs(y - 30) + Math.abs(x - 40) < 12 ? 200 : 0),
    ],
    [
      'a box that moves before a black ground',
      (y: number, x: number, t: number) =>
        Math.abs(y - 30) < 12 && Math.abs(x - 20 * t - 10) < 12 ? 200 : 0,
    ],
    ['a line that is lit in one frame', (y: number, _: number, t: number) => (y > 8 || t === 2 ? 90 : 0)],
    ['a dark line at the edge', (y: number) => (y === 0 ? 0 : 90)],
    ['a night sky over hills', (y: number, x: number) => (y > 20 + (x % 37) ? 90 : 0)],
  ])('are not found in %s', (_, level) => {
    expect(findBars(frames(level), size)).toBeNull()
  })
})
