import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { hasFfmpeg } from '../lib/io/video.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { mean } from '../lib/ops/reduce.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { openDataset } from '../lib/train/dataset.ts'
import { latestCheckpoint, runTraining, type TrainEvent } from '../lib/train/run.ts'
import { VaeTrainer } from '../lib/train/vae-trainer.ts'
import { losses } from './fixtures/events.ts'
import { mountSmallDisk, remount } from './fixtures/small-disk.ts'
import { FakeVideo, fakeClips, tinyLatents, tinyTrainer, tinyVae } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'faults-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

type Parts = ReturnType<typeof tinyTrainer>
const dispose = ({ trainer, model }: Parts): void => {
  trainer.dispose()
  model.dispose()
}
async function follow(events: AsyncIterable<TrainEvent>, seen: TrainEvent[] = []): Promise<TrainEvent[]> {
  for await (const event of events) seen.push(event)
  return seen
}

const mount = (name: string, size: string): string | undefined => mountSmallDisk(join(folder, name), size)

/** Losses of a run of `steps` that nothing disturbs, with the data of the given folder. */
async function undisturbed(data: string, steps: number, count = 9): Promise<number[]> {
  const cache = await tinyLatents(data, { count })
  const parts = tinyTrainer({ data: cache, out: `${data}-undisturbed`, steps })
  const found = losses(await follow(parts.trainer.run()))
  dispose(parts)
  cache.dispose()
  return found
}

describe('the output folder', () => {
  test('that fills up while a checkpoint is saved: the older one stays, nothing is half-written, saving works later', async (context) => {
    const disk = mount('full', '2500k')
    if (!disk) return context.skip('a small file system could not be mounted')
    const out = join(disk, 'run')
    const data = await tinyLatents(join(folder, 'full-data'), { count: 9 })
    const first = tinyTrainer({ data, out, steps: 8, checkpointEvery: 1 })
    const seen: TrainEvent[] = []
    await expect(follow(first.trainer.run(), seen)).rejects.toMatchObject({
      name: 'PyraflowError',
      code: 'ERR_IO',
      message: expect.stringMatching(/ENOSPC.*(free|space)/s),
    })
    const saved = seen.flatMap((e) => (e.type === 'checkpoint' ? [e.step] : []))
    expect(saved.length).toBeGreaterThan(0)
    const entries = readdirSync(out).filter((name) => !['metrics.jsonl', 'loss.svg'].includes(name))
    expect(entries).toEqual([`checkpoint-${saved.at(-1)}`])
    const model = await PyramidFluxTransformer.fromPretrained(join(out, entries[0]!, 'diffusion_transformer'))
    model.dispose()
    dispose(first)

    remount(disk, 'size=50m')
    const second = tinyTrainer({ data, out, steps: 8, checkpointEvery: 1 })
    const again = await follow(second.trainer.run({ resume: true }))
    expect(again[0]).toEqual({ type: 'resume', step: saved.at(-1) })
    dispose(second)
    data.dispose()
    const whole = await undisturbed(join(folder, 'full-data'), 8)
    expect(losses(again)).toEqual(whole.slice(saved.at(-1)))
  })

  test('that fills up while metrics are written ends the run with ERR_IO', async (context) => {
    if (!existsSync('/dev/full')) return context.skip('this system has no /dev/full')
    const data = await tinyLatents(join(folder, 'metrics-data'))
    const out = join(folder, 'metrics')
    mkdirSync(out)
    execFileSync('ln', ['-s', '/dev/full', join(out, 'metrics.jsonl')])
    const parts = tinyTrainer({ data, out, steps: 8 })
    await expect(follow(parts.trainer.run())).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/metrics\.jsonl.*ENOSPC/),
    })
    dispose(parts)
    data.dispose()
  })

  test('that cannot be made or written is named', async () => {
    const data = await tinyLatents(join(folder, 'unwritable-data'))
    const file = join(folder, 'a-file')
    writeFileSync(file, '')
    const blocked = join(folder, 'blocked')
    mkdirSync(join(blocked, 'metrics.jsonl'), { recursive: true })
    const places: [string, RegExp][] = [
      [join(file, 'run'), /a-file/],
      [blocked, /metrics\.jsonl.*EISDIR/],
    ]
    const disk = mount('read-only', '1m')
    if (disk) {
      remount(disk, 'ro')
      // Node says ENOENT where it cannot make a folder on a read-only file system.
      places.push([join(disk, 'run'), /read-only.run.*(EROFS|ENOENT)/], [disk, /metrics\.jsonl.*EROFS/])
    }
    for (const [out, message] of places) {
      const parts = tinyTrainer({ data, out, steps: 2 })
      await expect(follow(parts.trainer.run()), out).rejects.toMatchObject({
        name: 'PyraflowError',
        code: 'ERR_IO',
        message: expect.stringMatching(message),
      })
      dispose(parts)
    }
    data.dispose()
    await engine.idle()
    expect(engine.memory().live).toBe(0)
  })
})

describe('a training run', () => {
  test('skips steps without a finite loss, leaves the weights alone, and gives up after five', async () => {
    const data = await tinyLatents(join(folder, 'nan-data'), { value: Number.NaN })
    const parts = tinyTrainer({ data, out: join(folder, 'nan'), steps: 20 })
    const key = 'proj_out.bias'
    const before = await parts.model.parameters.get(key)!.floats()
    const seen: TrainEvent[] = []
    await expect(follow(parts.trainer.run(), seen)).rejects.toMatchObject({
      code: 'ERR_NUMERICS',
      message: expect.stringMatching(/step 5.*5 times.*learning rate/),
    })
    expect(seen.map(({ type, step }) => [type, step])).toEqual([1, 2, 3, 4].map((step) => ['skipped', step]))
    expect(await parts.model.parameters.get(key)!.floats()).toEqual(before)
    dispose(parts)
    data.dispose()
    await engine.idle()
    expect(engine.memory().live).toBe(0)
  })

  test('goes on after a few bad steps', async () => {
    const data = await tinyLatents(join(folder, 'heal-data'))
    const parts = tinyTrainer({ data, out: join(folder, 'heal'), steps: 1 })
    const seen = await follow(
      runTraining({
        out: join(folder, 'heal'),
        steps: 9,
        learningRates: new Float64Array(9).fill(1e-3),
        optimizer: parts.trainer.optimizer,
        prepare: async () => parts.trainer.batch(0),
        *forward(step, batch: ReturnType<typeof parts.trainer.batch>) {
          if (step % 8 > 1 && step % 8 < 6) return { loss: mean(Tensor.full([2], Number.NaN)) }
          return yield* parts.trainer.forwardSteps(step, batch)
        },
        saveModel: async () => undefined,
      } as Parameters<typeof runTraining>[0]),
    )
    expect(seen.map((e) => e.type)).toEqual([
      ...['step', 'step', 'skipped', 'skipped', 'skipped', 'skipped', 'step', 'step', 'step', 'checkpoint'],
    ])
    dispose(parts)
    data.dispose()
  })

  test('passes on an error of the engine once and frees what the step held', async () => {
    const data = await tinyLatents(join(folder, 'native-data'))
    const parts = tinyTrainer({ data, out: join(folder, 'native'), steps: 4 })
    await engine.idle()
    const before = engine.memory().live
    const events = parts.trainer.run()
    await events.next()
    const bias = parts.model.parameters.get('proj_out.bias')!
    const bad = (): void => engine.run('binary', [bias, null], [null], [0])
    // An error elsewhere is not the run's; one in its own job is.
    bad()
    expect((await events.next()).value).toMatchObject({ type: 'step', step: 2 })
    await expect(engine.idle()).rejects.toMatchObject({ name: 'PyraflowError' })
    engine.within(engine.newJob() - 1, bad)
    await expect(events.next()).rejects.toMatchObject({ name: 'PyraflowError' })
    await engine.idle()
    expect(engine.memory().live).toBe(before)
    dispose(parts)
    data.dispose()
  })
})

describe('clips and captions', () => {
  const size = { width: 32, height: 32, frames: 9 }
  const captions = (name: string, lines: readonly string[]): string => {
    const dir = join(folder, name)
    mkdirSync(dir)
    for (const clip of ['0.mp4', '1.mp4', 'broken.mp4']) writeFileSync(join(dir, clip), 'no film')
    writeFileSync(join(dir, 'captions.jsonl'), lines.join('\n'))
    return dir
  }
  const good = ['0.mp4', '1.mp4'].map((video) => JSON.stringify({ video, text: 'a red circle' }))
  async function train(data: Awaited<ReturnType<typeof openDataset>>): Promise<unknown> {
    const model = tinyVae({ train: true })
    const trainer = new VaeTrainer({ model, data, out: join(folder, 'clips-run'), steps: 3, batchSize: 1 })
    try {
      return await follow(trainer.run())
    } finally {
      trainer.dispose()
      model.dispose()
    }
  }

  test('a caption line that is not JSON is named by file and line', async () => {
    const dir = captions('bad-line', [good[0]!, '', '{"video": "1.mp4", "text": ', good[1]!])
    await expect(openDataset(dir, { ...size, backend: new FakeVideo(32, 9) })).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/captions\.jsonl:3.*not JSON/),
    })
  })

  test('a clip that cannot be decoded ends training with its name', async () => {
    const dir = captions('bad-clip', [
      good[0]!,
      JSON.stringify({ video: 'broken.mp4', text: 'a blue square' }),
    ])
    const data = await openDataset(dir, { ...size, backend: new FakeVideo(32, 9) })
    await expect(train(data)).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringContaining('broken.mp4'),
    })
  })

  test('a file that is no film ends training with its name, with the real decoder too', async (context) => {
    if (!(await hasFfmpeg())) return context.skip('ffmpeg is not installed')
    const data = await openDataset(captions('no-film', good), size)
    await expect(train(data)).rejects.toMatchObject({
      code: 'ERR_IO',
      message: expect.stringMatching(/[01]\.mp4/),
    })
    await engine.idle()
    expect(engine.memory().live).toBe(0)
  })

  test('an abort while the next clip is being decoded still saves a checkpoint', async () => {
    const { data, backend } = fakeClips(['0.mp4', '1.mp4'])
    const stop = new AbortController()
    const decode = backend.decode.bind(backend)
    // The third clip never comes; only the abort ends the wait.
    backend.decode = (path, ...rest: unknown[]) => {
      if (backend.decodes < 2) return decode(path)
      const { signal } = rest[0] as { signal: AbortSignal }
      return new Promise((_, reject) => {
        const end = (): void => reject(Object.assign(new Error('stopped'), { name: 'AbortError' }))
        if (signal.aborted) end()
        signal.addEventListener('abort', end)
      })
    }
    const model = tinyVae({ train: true })
    const out = join(folder, 'abort-decode')
    const trainer = new VaeTrainer({
      model,
      data,
      out,
      steps: 9,
      batchSize: 1,
      crops: [{ size: 16, frames: 1 }],
    })
    const run = async (): Promise<void> => {
      for await (const event of trainer.run({ signal: stop.signal })) {
        if (event.type === 'step' && event.step === 2) setTimeout(() => stop.abort(), 20)
      }
    }
    await expect(run()).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    const found = await latestCheckpoint(out)
    expect(found?.step).toBe(2)
    expect(JSON.parse(readFileSync(join(found!.path, 'state.json'), 'utf8'))).toEqual({ step: 2, updates: 2 })
    trainer.dispose()
    model.dispose()
  })
})
