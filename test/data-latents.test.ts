import { createHash } from 'node:crypto'
import {
  copyFileSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { afterAll, describe, expect, test } from 'vitest'
import { normaliseLatents } from '../lib/flow/normalise.ts'
import { hasFfmpeg } from '../lib/io/video.ts'
import { framesDecode } from '../lib/ops/frames.ts'
import { scope } from '../lib/tensor/scope.ts'
import { noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { type DatasetOptions, openDataset } from '../lib/train/dataset.ts'
import { type EncodeLatentsOptions, encodeLatents, type StaleLatents } from '../lib/train/latent-cache.ts'
import { LatentDataset } from '../lib/train/latents.ts'
import { SHARD_ROWS } from '../lib/train/shards.ts'
import { makeDataset } from './fixtures/clips.ts'
import { startChild } from './fixtures/compiled.ts'
import { mountSmallDisk, remount } from './fixtures/small-disk.ts'
import { FakeVideo, scramble, tinyVae } from './fixtures/tiny.ts'
import { live } from './gradcheck.ts'

const root = mkdtempSync(join(tmpdir(), 'pyraflow-latents-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))

const ffmpeg = await hasFfmpeg()
if (!ffmpeg) console.log('ffmpeg is not installed: the tests with real clips are not run')
const SIZE = { width: 64, height: 64, frames: 9 }
const fake = { ...SIZE, backend: new FakeVideo(64, 9) }
const clips = fakeFiles('clips', 6)

const hashOf = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex')
/** Names and bytes of everything in a cache. */
function contentOf(dir: string): Record<string, string> {
  const files = (readdirSync(dir, { recursive: true }) as string[]).filter((name) => /\./.test(name)).sort()
  return Object.fromEntries(files.map((name) => [name, hashOf(readFileSync(join(dir, name)))]))
}
const shardsIn = (dir: string): string[] => readdirSync(join(dir, 'shards')).sort()

async function encode(
  out: string,
  options: EncodeLatentsOptions & {
    path?: string
    size?: DatasetOptions
    seed?: number
    dtype?: 'bf16'
  } = {},
) {
  const { path = clips, size = fake, seed = 5, dtype = 'f32', ...rest } = options
  const vae = tinyVae({ seed, dtype })
  try {
    return await encodeLatents(vae, await openDataset(path, size), out, rest)
  } finally {
    vae.dispose()
  }
}

function nearestBf16(x: number): number {
  const word = new Uint32Array(Float32Array.of(x).buffer)
  const bits = word[0] as number
  word[0] = (bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000
  return new Float32Array(word.buffer)[0] as number
}
const average = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

/** A data set of files that only the fake decoder knows, each with bytes of its own. */
function fakeFiles(name: string, count: number): string {
  const dir = mkdtempSync(join(root, `${name}-`))
  const lines = Array.from({ length: count }, (_, i) => {
    writeFileSync(join(dir, `${i}.mp4`), `file ${i}`)
    return JSON.stringify({ video: `${i}.mp4`, text: `clip ${i}` })
  })
  writeFileSync(join(dir, 'captions.jsonl'), lines.join('\n'))
  return dir
}

describe('the latent cache', () => {
  const small = { width: 32, height: 32, frames: 9, backend: new FakeVideo(32, 9) }

  test('gives back the posteriors that the VAE gave, normalised to zero mean and unit variance', async () => {
    const data = await openDataset(fakeFiles('posterior', 3), small)
    const vae = tinyVae()
    const out = join(root, 'posterior')
    const progress: string[] = []
    const done = await encodeLatents(vae, data, out, { onProgress: (n, all) => progress.push(`${n}/${all}`) })
    expect(progress).toEqual(['1/3', '2/3', '3/3'])
    expect(done).toMatchObject({ clips: 3, encoded: 3, reused: 0, bad: [], stale: null })
    const cache = await LatentDataset.open(out)
    expect([...cache.captions]).toEqual(['clip 0', 'clip 1', 'clip 2'])
    expect(cache.buckets.map(({ shape }) => shape)).toEqual([[16, 2, 4, 4]])
    expect(done.bytes).toBe(3 * 2 * 2 * 16 * 2 * 4 * 4)
    const order = [2, 0]
    const { mean, logvar } = scope(() => cache.gather(order))
    for (const [row, i] of order.entries()) {
      const clip = Tensor.from(await data.load(i), [1, 9, 32, 32, 3])
      const posterior = noGrad(() => scope(() => vae.encode(framesDecode(clip))))
      const size = posterior.mean.size
      const part = (x: Float32Array): Float32Array => x.subarray(row * size, (row + 1) * size)
      expect(part(await mean.floats())).toEqual((await posterior.mean.floats()).map(nearestBf16))
      expect(part(await logvar.floats())).toEqual((await posterior.logvar.floats()).map(nearestBf16))
    }
    const all = scope(() => normaliseLatents(cache.gather([0, 1, 2]).mean, cache.normalisation))
    const values = await all.floats()
    for (const first of [true, false]) {
      const part = [...values].filter((_, i) => (Math.floor(i / 16) % 2 === 0) === first)
      expect(average(part)).toBeCloseTo(0, 3)
      expect(average(part.map((v) => v * v))).toBeCloseTo(1, 3)
    }
    cache.dispose()
    vae.dispose()
  })

  test('is refused when it is missing, damaged, or lacks a shard', async () => {
    await expect(LatentDataset.open(join(root, 'nowhere'))).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringContaining('pyraflow encode'),
    })
    const out = join(root, 'damaged')
    const vae = tinyVae()
    await encodeLatents(vae, await openDataset(fakeFiles('damaged', 2), small), out)
    vae.dispose()
    const index = join(out, 'index.jsonl')
    const whole = readFileSync(index, 'utf8')
    const refused = async (text: string, why: RegExp): Promise<void> => {
      writeFileSync(index, text)
      const expected = { code: 'ERR_CHECKPOINT', message: expect.stringMatching(why) }
      await expect(LatentDataset.open(out)).rejects.toMatchObject(expected)
    }
    await refused('{', /index\.jsonl/)
    await refused(whole.split('\n').slice(0, 2).join('\n'), /1 of 2 lines/)
    await refused(whole.replace('pyraflow-latents-2', 'pyraflow-latents-1'), /format pyraflow-latents-1/)
    await refused(whole.replace(/"key":"./, '"key":"x'), /latents of 0\.mp4/)
    writeFileSync(index, whole)
    const shard = join(out, 'shards', shardsIn(out)[0] as string)
    writeFileSync(shard, readFileSync(shard).subarray(0, 2000))
    await expect(LatentDataset.open(out)).rejects.toMatchObject({ code: 'ERR_CHECKPOINT' })
    rmSync(shard)
    await expect(LatentDataset.open(out)).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining(shard),
    })
    expect(await live()).toBe(0)
  })

  test('positions of two buckets, or none, are refused', async () => {
    const out = join(root, 'positions')
    const vae = tinyVae()
    await encodeLatents(vae, await openDataset(fakeFiles('positions', 2), small), out)
    vae.dispose()
    const cache = await LatentDataset.open(out)
    for (const wrong of [[], [2], [0, -1]]) {
      expect(() => cache.gather(wrong)).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
    }
    cache.dispose()
  })

  test('a size that the VAE cannot encode is refused before the first clip', async () => {
    const vae = tinyVae()
    for (const size of [{ width: 36 }, { frames: 8 }]) {
      const data = await openDataset(fakeFiles('size', 1), { ...small, ...size })
      const out = join(root, 'size')
      await expect(encodeLatents(vae, data, out)).rejects.toMatchObject({
        code: 'ERR_OPTION',
        message: expect.stringMatching(/multiples of 8 pixels, and 1 \+ a multiple of 8 frames/),
      })
      expect(existsSync(out)).toBe(false)
    }
    vae.dispose()
  })

  // Other programs on the machine delay this one too, hence the second and third chance.
  test('never holds up the event loop, and frees all it took', { retry: 2 }, async () => {
    const side = 256
    const backend = new FakeVideo(side, 9)
    const clip = await backend.decode('0.mp4')
    backend.decode = async () => clip
    const data = await openDataset(fakeFiles('loop', 5), { width: side, height: side, frames: 9, backend })
    const vae = tinyVae()
    await encodeLatents(vae, await openDataset(fakeFiles('warm', 1), small), join(root, 'warm'))
    const before = await live()
    const monitor = monitorEventLoopDelay({ resolution: 1 })
    monitor.enable()
    await encodeLatents(vae, data, mkdtempSync(join(root, 'loop-')))
    monitor.disable()
    const p99 = monitor.percentile(99) / 1e6 - 1
    console.log(`encoding: event loop p99 ${p99.toFixed(1)} ms over ${monitor.count} samples`)
    expect(await live()).toBe(before)
    vae.dispose()
    expect(monitor.count).toBeGreaterThan(50)
    expect(p99).toBeLessThan(10)
  })
})

describe('a latent cache of which something is there', () => {
  test('that was killed again and again ends with the bytes of one that was not', async () => {
    const path = fakeFiles('killed', 24)
    const whole = join(root, 'killed-not')
    expect(await encode(whole, { path })).toMatchObject({ encoded: 24, reused: 0 })
    const out = join(root, 'killed')
    let done = 0
    for (let kill = 1; kill <= 6; kill++) {
      const child = startChild('child-encode', [path, out])
      await child.line((line) => line === `clip ${done + 1}`)
      // Not always between two clips: also while one is encoded or written.
      await new Promise((resolve) => setTimeout(resolve, (kill * 13) % 31))
      child.process.kill('SIGKILL')
      await child.exit
      done = child.lines.filter((line) => line.startsWith('clip')).length
      expect(done).toBeLessThan(24)
      expect(shardsIn(out).filter((name) => name.endsWith('.safetensors')).length).toBeGreaterThanOrEqual(
        done,
      )
      expect(existsSync(join(out, 'index.jsonl')), `after ${kill}`).toBe(false)
    }
    const last = startChild('child-encode', [path, out])
    const finished = await last.line((line) => line.startsWith('finished'))
    expect((await last.exit).code).toBe(0)
    const [, encoded, reused] = finished.split(' ').map(Number)
    expect(reused).toBeGreaterThanOrEqual(done)
    expect((encoded as number) + (reused as number)).toBe(24)
    expect(contentOf(out)).toEqual(contentOf(whole))
  }, 120_000)

  test('that was aborted goes on with what is missing', async () => {
    const out = join(root, 'aborted')
    const stop = new AbortController()
    const onProgress = (done: number): void => {
      if (done === 2) stop.abort()
    }
    const aborted = encode(out, { signal: stop.signal, onProgress })
    await expect(aborted).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    expect(existsSync(join(out, 'index.jsonl'))).toBe(false)
    expect(shardsIn(out)).toHaveLength(2)
    const whole = join(root, 'not-aborted')
    expect(await encode(whole)).toMatchObject({ encoded: 6, reused: 0 })
    expect(await encode(out)).toMatchObject({ encoded: 4, reused: 2 })
    expect(contentOf(out)).toEqual(contentOf(whole))
    expect(await encode(out)).toMatchObject({ encoded: 0, reused: 6 })
    expect(contentOf(out)).toEqual(contentOf(whole))
    expect(await live()).toBe(0)
  })

  test('is made anew for another VAE, size, rate or type, says so, and opens as it was until then', async () => {
    const out = join(root, 'stale')
    await encode(out)
    const before = contentOf(out)
    const changes: [Parameters<typeof encode>[1], string[]][] = [
      [{ seed: 6 }, ['vae']],
      [{ size: { ...fake, width: 32 } }, ['size']],
      [{ size: { ...fake, frames: 1 } }, ['size']],
      [{ size: { ...fake, fps: 4, frames: 1 } }, ['fps', 'size']],
      [{ dtype: 'bf16' }, ['dtype', 'vae']],
      [{ tile: 32 }, ['tile']],
      [{ size: { ...fake, short: 'repeat' } }, ['short']],
    ]
    for (const [change, because] of changes) {
      const heard: StaleLatents[] = []
      const stop = new AbortController()
      const stopped = encode(out, {
        ...change,
        signal: stop.signal,
        onStale: (stale) => heard.push(stale),
        onProgress: () => stop.abort(),
      })
      await expect(stopped).rejects.toMatchObject({ code: 'ERR_ABORTED' })
      expect(heard).toEqual([{ clips: 6, because }])
      ;(await LatentDataset.open(out)).dispose()
      expect(contentOf(out)).toMatchObject(before)
      // Back to what it was: the other latents go.
      expect(await encode(out, { onStale: () => undefined })).toMatchObject({ encoded: 0, reused: 6 })
      expect(contentOf(out)).toEqual(before)
    }
    const heard: StaleLatents[] = []
    const again = await encode(out, { seed: 6, onStale: (stale) => heard.push(stale) })
    expect(again).toMatchObject({ encoded: 6, reused: 0, stale: { clips: 6, because: ['vae'] } })
    expect(heard).toHaveLength(1)
    expect(contentOf(out)).not.toEqual(before)
  })

  test('keeps the clips that did not change when others do, and the same bytes only once', async () => {
    const dir = fakeFiles('edited', 4)
    const out = join(root, 'edited-latents')
    expect(await encode(out, { path: dir })).toMatchObject({ clips: 4, encoded: 4 })
    writeFileSync(join(dir, '1.mp4'), 'other bytes')
    copyFileSync(join(dir, '0.mp4'), join(dir, '0-again.mp4'))
    rmSync(join(dir, '3.mp4'))
    const lines = ['2.mp4', '0-again.mp4', '1.mp4', '0.mp4'].map((video) =>
      JSON.stringify({ video, text: video }),
    )
    writeFileSync(join(dir, 'captions.jsonl'), lines.join('\n'))
    const done = await encode(out, { path: dir })
    expect(done).toMatchObject({ clips: 4, encoded: 1, reused: 3, stale: null })
    expect(done.bytes).toBe(3 * 2 * 2 * 16 * 2 * 8 * 8)
    const fresh = join(root, 'edited-fresh')
    await encode(fresh, { path: dir })
    expect(contentOf(out)).toEqual(contentOf(fresh))
    const cache = await LatentDataset.open(out)
    expect([...cache.captions]).toEqual(['2.mp4', '0-again.mp4', '1.mp4', '0.mp4'])
    const { mean } = scope(() => cache.gather([1, 3, 0]))
    const values = await mean.floats()
    const row = (i: number): Float32Array => values.slice(i * 2048, (i + 1) * 2048)
    expect(row(0)).toEqual(row(1))
    expect(row(0)).not.toEqual(row(2))
    mean.dispose()
    cache.dispose()
  })
})

describe.skipIf(!ffmpeg)('a latent cache of real clips', () => {
  test('of several sizes, lengths and pictures has a bucket for each, and gathers within one', async () => {
    const dir = join(root, 'mixed')
    await makeDataset(dir, {
      'wide.mp4': { width: 96, height: 64, frames: 17 },
      'tall.mp4': { width: 64, height: 96, frames: 9 },
      'wide-short.mp4': { width: 96, height: 64, frames: 9 },
      'picture.png': { width: 80, height: 80 },
      'wide-2.mp4': { width: 96, height: 64, frames: 20, seed: 3 },
    })
    const wide = { width: 48, height: 32 }
    const buckets = [
      { ...wide, frames: 17 },
      { ...wide, frames: 9 },
      { width: 32, height: 48, frames: 9 },
      { width: 32, height: 32, frames: 1 },
      { width: 64, height: 64, frames: 1 },
    ]
    const out = join(root, 'mixed-latents')
    expect(await encode(out, { path: dir, size: { buckets } })).toMatchObject({ clips: 5, bad: [] })
    const cache = await LatentDataset.open(out)
    expect(cache.buckets.map(({ shape, indices }) => [shape.join(), [...indices]])).toEqual([
      ['16,3,4,6', [0, 4]],
      ['16,2,4,6', [2]],
      ['16,2,6,4', [1]],
      ['16,1,8,8', [3]],
    ])
    expect(() => cache.gather([0, 1])).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
    const { mean, logvar } = cache.gather([4, 0, 4])
    expect(mean.shape).toEqual([3, 16, 3, 4, 6])
    const values = await mean.floats()
    expect(values.slice(0, 1152)).toEqual(values.slice(2304))
    expect(values.slice(0, 1152)).not.toEqual(values.slice(1152, 2304))
    for (const made of [mean, logvar]) made.dispose()
    cache.dispose()
    expect(await live()).toBe(0)
  })

  test('fails with the name of a clip that is no film, or leaves it out', async () => {
    const dir = join(root, 'bad')
    await makeDataset(dir, { '0.mp4': {}, '1.mp4': { seed: 1 } })
    writeFileSync(join(dir, '2.mp4'), 'no film')
    const lines = ['0.mp4', '2.mp4', '1.mp4'].map((video) => JSON.stringify({ video, text: video }))
    writeFileSync(join(dir, 'captions.jsonl'), lines.join('\n'))
    const out = join(root, 'bad-latents')
    await expect(encode(out, { path: dir, size: SIZE })).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringContaining('2.mp4'),
    })
    expect(existsSync(join(out, 'index.jsonl'))).toBe(false)
    const heard: string[] = []
    const size = {
      ...SIZE,
      onBad: 'skip',
      onBadItem: ({ place }: { place: string }) => heard.push(place),
    } as const
    const done = await encode(out, { path: dir, size })
    expect(done).toMatchObject({ clips: 2, encoded: 1, reused: 1, bad: [{ reason: 'unreadable' }] })
    expect(heard).toEqual([join(dir, '2.mp4')])
    const cache = await LatentDataset.open(out)
    expect([...cache.captions]).toEqual(['0.mp4', '1.mp4'])
    cache.dispose()
  })
})

describe('shards', () => {
  test('hold at most so many rows, and rows are found across them', async () => {
    const count = SHARD_ROWS + 3
    const backend = new FakeVideo(8, 1)
    const size = { width: 8, height: 8, frames: 1, backend }
    const data = await openDataset(fakeFiles('many', count), size)
    const vae = tinyVae()
    scramble(vae.parameters)
    const out = join(root, 'many')
    expect(await encodeLatents(vae, data, out)).toMatchObject({ clips: count, encoded: count })
    expect(shardsIn(out)).toHaveLength(2)
    const cache = await LatentDataset.open(out)
    const picked = [0, count - 1, 5, SHARD_ROWS, SHARD_ROWS - 1, 1]
    const { mean, logvar } = cache.gather(picked)
    const values = await mean.floats()
    for (const [row, i] of picked.entries()) {
      const one = cache.gather([i])
      expect(values.slice(row * 16, row * 16 + 16), `clip ${i}`).toEqual(await one.mean.floats())
      one.mean.dispose()
      one.logvar.dispose()
    }
    for (const made of [mean, logvar]) made.dispose()
    cache.dispose()
    vae.dispose()
  })

  test('a disk that fills up is an ERR_IO, and the cache is finished when there is room', async (context) => {
    const disk = mountSmallDisk(join(root, 'disk'), '60k')
    if (!disk) return context.skip('a small file system could not be mounted')
    const backend = new FakeVideo(64, 9)
    const data = await openDataset(fakeFiles('full', 8), { ...SIZE, backend })
    const vae = tinyVae()
    const out = join(disk, 'latents')
    await expect(encodeLatents(vae, data, out)).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/ENOSPC.*(free|space)/s),
    })
    expect(shardsIn(out).filter((name) => name.endsWith('.tmp'))).toEqual([])
    remount(disk, 'size=2m')
    const done = await encodeLatents(vae, data, out)
    expect(done.reused).toBeGreaterThan(0)
    expect(done.clips).toBe(8)
    const elsewhere = join(root, 'not-full')
    await encodeLatents(vae, data, elsewhere)
    expect(contentOf(out)).toEqual(contentOf(elsewhere))
    vae.dispose()
  })
})
