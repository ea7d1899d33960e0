import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, describe, expect, it } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { embedding } from '../lib/ops/embedding.ts'
import { linear } from '../lib/ops/matmul.ts'
import { add, scale, silu } from '../lib/ops/pointwise.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { child, live } from './gradcheck.ts'

const bytesOf = (array: ArrayBufferView) => Buffer.from(array.buffer, array.byteOffset, array.byteLength)
describe('tensors', () => {
  it('carry numbers in and out in every dtype', async () => {
    expect(await Tensor.from([1, 2.5, -3], [3]).read()).toEqual(Float32Array.of(1, 2.5, -3))
    expect(await Tensor.from(Int32Array.of(-5, 2 ** 30)).read()).toEqual(Int32Array.of(-5, 2 ** 30))
    expect(await Tensor.from(Uint8Array.of(0, 255)).read()).toEqual(Uint8Array.of(0, 255))
    expect(await Tensor.from([1, 256.5], [2], 'bf16').read()).toEqual(Float32Array.of(1, 256))
    expect(await Tensor.full([2], 7, 'i32').read()).toEqual(Int32Array.of(7, 7))
    expect(await Tensor.zeros([0, 3]).read()).toEqual(new Float32Array(0))
    expect(await Tensor.full([1], 4).item()).toBe(4)
    const t = Tensor.zeros([2])
    t.write(Float32Array.of(8, 9))
    expect(await t.read()).toEqual(Float32Array.of(8, 9))
  })

  it('refuse counts, shapes and views that do not fit', async () => {
    expect(() => Tensor.from([1, 2, 3], [2])).toThrow(/2 values for shape \[2\], received 3/)
    expect(() => Tensor.zeros([2, -1])).toThrow(/whole numbers/)
    expect(() => Tensor.zeros([4]).view([3], 2)).toThrow(/at most 4 elements/)
    expect(() => Tensor.zeros([4]).write(new Float32Array(3))).toThrow(/16 bytes, received 12/)
    expect(() => scale(Tensor.zeros([1, 1, 1, 1, 1, 1, 1]), 2)).toThrow(/at most 6 dimensions/)
    await expect(Tensor.zeros([2]).item()).rejects.toThrow(/one element/)
    await engine.idle().catch(() => undefined)
  })

  it('share memory with their views until the last of them is disposed', async () => {
    const before = await live()
    const t = Tensor.from([0, 1, 2, 3, 4, 5])
    const tail = t.view([2, 2], 2)
    t.dispose()
    t.dispose()
    expect(await live()).toBe(before + 24)
    expect(await tail.read()).toEqual(Float32Array.of(2, 3, 4, 5))
    expect(await scale(tail.view([2], 1), 2).read()).toEqual(Float32Array.of(6, 8))
    tail.dispose()
  })

  it('say so when they are used after dispose', () => {
    const t = Tensor.zeros([2, 3])
    t.dispose()
    expect(t.disposed).toBe(true)
    expect(() => silu(t)).toThrow(/\[2,3\] was used after it was disposed.*keep/s)
    expect(() => t.view([6])).toThrow(/disposed/)
    expect(() => engine.run('unary', [t], [t], [0, 0, 0])).toThrow(/disposed/)
  })
})

describe('files', () => {
  const folder = mkdtempSync(join(tmpdir(), 'pyraflow-'))
  const path = join(folder, 'weights.bin')
  // Two f32, then two bf16 (1.5 and −2), then an f64.
  writeFileSync(
    path,
    Buffer.concat([
      bytesOf(Float32Array.of(3, 4)),
      bytesOf(Uint16Array.of(0x3fc0, 0xc000)),
      bytesOf(Float64Array.of(0.25)),
    ]),
  )
  afterAll(() => rmSync(folder, { recursive: true }))

  it('are mapped without a copy and outlive closeFile', async () => {
    const before = await live()
    const file = engine.openFile(path)
    expect(file.size).toBe(20)
    const wide = Tensor.mapped(file.id, 0, [2], 'f32')
    const narrow = Tensor.mapped(file.id, 8, [2], 'bf16')
    engine.closeFile(file.id)
    expect(await live()).toBe(before)
    expect(await wide.read()).toEqual(Float32Array.of(3, 4))
    expect(await narrow.read()).toEqual(Float32Array.of(1.5, -2))
    expect(await add(wide, narrow).read()).toEqual(Float32Array.of(4.5, 2))
    for (const t of [wide, narrow]) t.dispose()
  })

  it('are loaded with conversion', async () => {
    const { id } = engine.openFile(path)
    const t = Tensor.zeros([5])
    engine.load(t.view([2]), id, 8, 'bf16')
    engine.load(t.view([1], 2), id, 12, 'f64')
    engine.load(t.view([2], 3), id, 0, 'f32')
    engine.closeFile(id)
    expect(await t.read()).toEqual(Float32Array.of(1.5, -2, 0.25, 3, 4))
  })

  it('that are missing or too short are errors of their own', async () => {
    expect(() => engine.openFile(join(folder, 'none'))).toThrow(/none/)
    const { id } = engine.openFile(path)
    Tensor.mapped(id, 16, [2], 'f32')
    await expect(engine.idle()).rejects.toMatchObject({ code: 'ERR_IO' })
    engine.load(Tensor.zeros([100]), id, 0, 'f32')
    await expect(engine.idle()).rejects.toMatchObject({ code: 'ERR_IO' })
    engine.closeFile(id)
  })
})

describe('scope()', () => {
  it('frees everything but its result, wherever that is in an array or object', async () => {
    const before = await live()
    const outside = Tensor.zeros([4])
    const result = scope(() => {
      const a = scale(outside, 2)
      const b = scale(a, 2)
      return { list: [b], map: new Map([['c', scale(b, 2)]]), n: 3 }
    })
    expect(await live()).toBe(before + 3 * 16)
    result.list[0]?.dispose()
    result.map.get('c')?.dispose()
    expect(outside.disposed).toBe(false)
    outside.dispose()
    expect(await live()).toBe(before)
  })

  it('passes results of inner scopes to the outer one, and spares what keep() took out', async () => {
    let kept: Tensor | undefined
    let inner: Tensor | undefined
    scope(() => {
      inner = scope(() => scale(Tensor.zeros([2]), 1))
      expect(inner.disposed).toBe(false)
      kept = keep(Tensor.full([2], 5))
    })
    expect(inner?.disposed).toBe(true)
    expect(await kept?.read()).toEqual(Float32Array.of(5, 5))
    kept?.dispose()
  })

  it('frees what was made when its function throws', async () => {
    const before = await live()
    expect(() =>
      scope(() => {
        Tensor.zeros([8])
        throw new Error('no')
      }),
    ).toThrow('no')
    expect(await live()).toBe(before)
  })
})

describe('memory', () => {
  it('is back at its start after a thousand cycles of make, use and dispose', async () => {
    const before = await live()
    for (let i = 0; i < 1000; i++) {
      const a = Tensor.full([64 + (i % 7)], i)
      const b = silu(a)
      a.dispose()
      b.dispose()
    }
    expect(await live()).toBe(before)
    expect(engine.memory().queued).toBe(0)
  })

  it('counts the peak since it was reset', async () => {
    const before = await live()
    engine.resetPeak()
    scope(() => void Tensor.zeros([1000]))
    await engine.idle()
    expect(engine.memory().peak).toBe(before + 4000)
  })

  it('beyond maxMemory is refused by name, and the engine goes on', async () => {
    const { output } = await child(`
      const { engine } = await import('./lib/engine/engine.ts')
      const { Tensor } = await import('./lib/tensor/tensor.ts')
      engine.configure({ maxMemory: 1 << 20 })
      const small = Tensor.full([10], 3)
      const large = Tensor.full([1 << 20], 1)
      await large.read().then(() => console.log('no error'), (e) => console.log(e.code, e.message))
      large.dispose()
      console.log((await small.read()).length, (await Tensor.full([2], 4).read())[1])
      try { engine.configure({}) } catch (e) { console.log(e.code) }`)
    const lines = output.split('\n')
    expect(lines[0]).toMatch(/^ERR_MEMORY could not allocate 4194304 bytes/)
    expect(lines.slice(1)).toEqual(['10 4', 'ERR_DEVICE'])
  })
})

describe('the queue', () => {
  afterEach(() => engine.idle().catch(() => undefined))

  it('gives an op back at once, whatever it costs', async () => {
    const w = Tensor.full([1024, 1024], 1e-3)
    await engine.idle()
    const start = performance.now()
    let x = w
    const made: Tensor[] = []
    for (let i = 0; i < 16; i++) {
      x = linear(x, w)
      made.push(x)
    }
    const queued = performance.now() - start
    await x.read()
    const total = performance.now() - start
    // 34 billion multiplications and additions: queueing them is a matter of microseconds.
    expect(queued).toBeLessThan(Math.max(20, total / 5))
    for (const t of made) t.dispose()
  })

  it('lets timers run while it works', async () => {
    const w = Tensor.full([1024, 1024], 1e-3)
    let x = w
    for (let i = 0; i < 16; i++) x = linear(x, w)
    let ticks = 0
    const timer = setInterval(() => ticks++, 1)
    await x.read()
    clearInterval(timer)
    expect(ticks).toBeGreaterThan(2)
  })

  it('keeps the first native error for the next await, names op and shapes, and works again', async () => {
    const table = Tensor.zeros([4, 3])
    const bad = embedding(table, Tensor.from(Int32Array.of(0, 9)))
    const later = add(bad, bad)
    await expect(later.read()).rejects.toMatchObject({
      code: 'ERR_SHAPE',
      message: expect.stringMatching(/embedding.*f32\[4,3\].*i32\[2\].*f32\[2,3\]/s),
    })
    await engine.idle()
    expect(await scale(Tensor.full([2], 3), 2).read()).toEqual(Float32Array.of(6, 6))
  })

  it('is error free again when idle() took the error', async () => {
    embedding(Tensor.zeros([4, 3]), Tensor.from(Int32Array.of(-1)))
    await expect(engine.idle()).rejects.toThrow(/embedding/)
    await engine.idle()
  })

  it('drops what cancel() finds queued', async () => {
    const w = Tensor.full([1024, 1024], 1e-3)
    const counter = Tensor.zeros([1])
    await engine.idle()
    for (let i = 0; i < 50; i++) linear(w, w)
    engine.run('fill', [], [counter], [1])
    await engine.cancel()
    expect(await counter.item()).toBe(0)
  })

  it('ends the process cleanly with work still queued', async () => {
    const { code, output } = await child(`
      const { Tensor } = await import('./lib/tensor/tensor.ts')
      const { linear } = await import('./lib/ops/matmul.ts')
      const w = Tensor.full([512, 512], 1)
      for (let i = 0; i < 100; i++) linear(w, w)
      console.log('done')`)
    expect([code, output]).toEqual([0, 'done'])
  })
})
