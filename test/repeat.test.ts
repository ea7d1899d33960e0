import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { embedding } from '../lib/ops/embedding.ts'
import { matmul } from '../lib/ops/matmul.ts'
import { add, scale } from '../lib/ops/pointwise.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { sampledUnits } from './fixtures/sampling.ts'
import { writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'repeat-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** Notes the ops of `fn` and gives the recording with its result. */
function record<T>(fn: () => T): { id: number; made: T } {
  const id = engine.beginRecording()
  try {
    return { id, made: scope(fn) }
  } finally {
    engine.endRecording(id)
  }
}

const input = (seed: number): Tensor => new Generator(seed).normal([24, 24])
const copy = (x: Tensor, to: Tensor): void => engine.run('cast', [x], [to], [])

// Memory of freed results is used again inside; numbers from the host are written into memory that is freed, too.
function work(x: Tensor): Tensor {
  let y = scope(() => scale(matmul(x, x), 0.1))
  for (let i = 0; i < 4; i++) {
    const offset = Tensor.from(new Float32Array(24 * 24).fill(i), [24, 24])
    y = scope(() => add(matmul(y, x), offset))
    offset.dispose()
  }
  return y
}

describe('a recording', () => {
  test('does again what was noted, with what lies in its inputs meanwhile', async () => {
    const x = input(1)
    const { id, made } = record(() => work(x))
    const first = await made.floats()
    const direct = async (seed: number): Promise<Float32Array> => {
      const own = input(seed)
      const y = scope(() => work(own))
      const values = await y.floats()
      for (const t of [own, y]) t.dispose()
      return values
    }
    expect(first).toEqual(await direct(1))
    for (const seed of [2, 3]) {
      const next = input(seed)
      copy(next, x)
      engine.replay(id)
      expect(await made.floats()).toEqual(await direct(seed))
      next.dispose()
    }
    engine.forget(id)
    for (const t of [x, made]) t.dispose()
  })

  test('keeps its memory until it is forgotten, and what it made as long as somebody holds it', async () => {
    const before = await live()
    for (const forgetFirst of [true, false]) {
      const x = input(1)
      const { id, made } = record(() => work(x))
      const values = await made.floats()
      expect(await live()).toBeGreaterThan(before + x.bytes + made.bytes)
      if (forgetFirst) {
        engine.forget(id)
        expect(await live()).toBe(before + x.bytes + made.bytes)
        expect(await made.floats()).toEqual(values)
        made.dispose()
      } else {
        made.dispose()
        engine.forget(id)
      }
      x.dispose()
      expect(await live()).toBe(before)
    }
  })

  test('of work that failed is not repeated, and the next one is', async () => {
    const table = input(1)
    const { id, made } = record(() => embedding(table, Tensor.from(Int32Array.of(1, 24))))
    await expect(made.read()).rejects.toMatchObject({ code: 'ERR_SHAPE' })
    engine.replay(id)
    await expect(engine.idle()).rejects.toMatchObject({
      code: 'ERR_DEVICE',
      message: expect.stringMatching(/what was recorded is not whole/),
    })
    engine.forget(id)
    engine.replay(id)
    await expect(engine.idle()).rejects.toMatchObject({ code: 'ERR_DEVICE' })
    const good = record(() => embedding(table, Tensor.from(Int32Array.of(3))))
    engine.replay(good.id)
    expect(await good.made.floats()).toEqual((await table.floats()).slice(72, 96))
    engine.forget(good.id)
    for (const t of [table, made, good.made]) t.dispose()
  })

  test('refuses to run without a tensor that it read', async () => {
    const [x, w] = [input(1), input(2)]
    const { id, made } = record(() => matmul(x, w))
    await made.floats()
    w.dispose()
    engine.replay(id)
    await expect(engine.idle()).rejects.toMatchObject({
      code: 'ERR_DEVICE',
      message: expect.stringMatching(/a tensor that was read or written is gone/),
    })
    engine.forget(id)
    for (const t of [x, made]) t.dispose()
    await engine.idle()
  })

  test('stops between its ops when its job is cancelled', async () => {
    const job = engine.newJob()
    const side = 512
    const x = new Generator(1).normal([side, side])
    const within = <T>(fn: () => T): T => engine.within(job, fn)
    const { id, made } = within(() =>
      record(() => {
        let y = scope(() => scale(matmul(x, x), 0.01))
        for (let i = 0; i < 150; i++) {
          const next = scope(() => scale(matmul(y, x), 0.01))
          y.dispose()
          y = next
        }
        return y
      }),
    )
    await engine.idle(job)
    const waiting = within(() => {
      engine.replay(id)
      return engine.idle(job)
    })
    // Only the wait is left in the queue: the recording runs.
    while (engine.memory().queued > 1) await new Promise(setImmediate)
    const rejected = expect(waiting).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    await engine.cancel(job)
    await rejected
    // It may be repeated afterwards.
    within(() => engine.replay(id))
    await engine.idle(job)
    within(() => engine.forget(id))
    for (const t of [x, made]) t.dispose()
  })

  test('takes nothing of what other jobs do meanwhile', async () => {
    const [one, other] = [engine.newJob(), engine.newJob()]
    const x = input(1)
    const id = engine.within(one, () => engine.beginRecording())
    const y = engine.within(one, () => keep(scale(x, 2)))
    const count = keep(Tensor.zeros([1]))
    engine.within(other, () => {
      const one = Tensor.full([1], 1)
      engine.run('axpby', [count, one], [count], [1, 1, 0])
      one.dispose()
    })
    engine.within(one, () => engine.endRecording(id))
    for (let i = 0; i < 3; i++) engine.within(one, () => engine.replay(id))
    expect(await count.item()).toBe(1)
    expect(await y.floats()).toEqual((await x.floats()).map((v) => 2 * v))
    engine.forget(id)
    for (const t of [x, y, count]) t.dispose()
  })
})

describe('sampling that repeats its steps', () => {
  let pipe: Pipeline
  beforeAll(async () => {
    await writePipeline(join(folder, 'model'))
    pipe = await Pipeline.load(join(folder, 'model'))
  })
  afterAll(() => pipe.dispose())

  test.each([true, false])(
    'gives the same bits as queueing each, guidance %s, and frees it all',
    async (guided) => {
      const before = await live()
      const sample = (repeat: boolean): Promise<Float32Array[]> =>
        sampledUnits(pipe.transformer, { guided, repeat, steps: [3, 1, 4], videoSteps: [2, 3, 1] })
      const repeated = await sample(true)
      expect(repeated).toHaveLength(3)
      expect(repeated).toEqual(await sample(false))
      expect(await live()).toBe(before)
    },
  )
})
