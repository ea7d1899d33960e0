import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { afterAll, describe, expect, test } from 'vitest'
import { ditConfig } from '../examples/shapes/networks.ts'
import { VOCABULARY } from '../examples/shapes/world.ts'
import { engine } from '../lib/engine/engine.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { matmul } from '../lib/ops/matmul.ts'
import { add } from '../lib/ops/pointwise.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { scope } from '../lib/tensor/scope.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { WordEncoder } from '../lib/text/word-encoder.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { runChild, startChild } from './fixtures/compiled.ts'
import { numbers, tinyLatents, tinyTrainer, writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'engine-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** 99th percentile of the event loop's delay in ms while `work` runs, less the sampling interval. */
async function delay(work: () => Promise<unknown>): Promise<{ p99: number; samples: number }> {
  const monitor = monitorEventLoopDelay({ resolution: 1 })
  monitor.enable()
  await work()
  monitor.disable()
  return { p99: monitor.percentile(99) / 1e6 - 1, samples: monitor.count }
}

// Other programs on the machine delay this one too, hence the second and third chance.
describe('the event loop', { retry: 2 }, () => {
  test('answers within 10 ms while a transformer is trained', async () => {
    const own = mkdtempSync(join(folder, 'delay-'))
    const data = await tinyLatents(join(own, 'data'), { side: 16, count: 8, frames: 3 })
    const { trainer, model } = tinyTrainer({ data, out: join(own, 'run'), steps: 45, batchSize: 8 })
    const events = trainer.run()
    // The first steps compile, in JavaScript as in oneDNN.
    for (let i = 0; i < 20; i++) await events.next()
    const { p99, samples } = await delay(async () => {
      for await (const event of events) void event
    })
    for (const part of [trainer, model, data]) part.dispose()
    console.log(`training: event loop p99 ${p99.toFixed(1)} ms over ${samples} samples`)
    expect(samples).toBeGreaterThan(50)
    expect(p99).toBeLessThan(10)
  })

  test('pauses for less than 10 ms in a training step of the toy network', async () => {
    // Tried again where other programs spoilt it: every attempt is a run of its own.
    const own = mkdtempSync(join(folder, 'pause-'))
    const data = await tinyLatents(join(own, 'data'), { side: 16, count: 64, frames: 4 })
    const model = PyramidFluxTransformer.create(ditConfig, { seed: 1, dtype: 'bf16', train: true })
    const text = new WordEncoder({ vocabulary: VOCABULARY, dim: 64, maxLength: 12, seed: 7 })
    const out = join(own, 'run')
    const trainer = new Trainer({ model, data, text, out, steps: 10, batchSize: 64 })
    const pauses: number[] = []
    let [longest, last, going] = [0, performance.now(), true]
    const turn = (): void => {
      const now = performance.now()
      longest = Math.max(longest, now - last)
      last = now
      if (going) setTimeout(turn, 1)
    }
    turn()
    for await (const event of trainer.run()) {
      if (event.type === 'step') pauses.push(longest)
      longest = 0
    }
    going = false
    for (const part of [trainer, model, data]) part.dispose()
    // The first steps compile; each of the others is a trial, of which other programs may spoil a few.
    const trials = pauses.slice(3).sort((a, b) => a - b)
    const typical = trials[trials.length >> 1] as number
    console.log(`toy training: longest pause of a step ${typical.toFixed(1)} ms`)
    expect(trials).toHaveLength(7)
    expect(typical).toBeLessThan(10)
  })

  test('answers within 10 ms while a video is generated', async () => {
    await writePipeline(join(folder, 'model'))
    const pipe = await Pipeline.load(join(folder, 'model'))
    const generate = (): Promise<unknown> =>
      pipe.generate({ prompt: 'a red circle', frames: 17, steps: [6, 6, 6] }).result()
    await generate()
    const { p99, samples } = await delay(async () => {
      await generate()
      await generate()
    })
    pipe.dispose()
    console.log(`generating: event loop p99 ${p99.toFixed(1)} ms over ${samples} samples`)
    expect(samples).toBeGreaterThan(20)
    expect(p99).toBeLessThan(10)
  })

  test('answers within 10 ms while large matrices are multiplied', async () => {
    const x = Tensor.from(numbers(1024 * 1024, 1, 0.05), [1024, 1024])
    await engine.idle()
    const { p99, samples } = await delay(async () => {
      const y = scope(() => {
        let product = x
        for (let i = 0; i < 20; i++) product = matmul(product, x)
        return product
      })
      await engine.idle()
      y.dispose()
    })
    x.dispose()
    console.log(`multiplying: event loop p99 ${p99.toFixed(1)} ms over ${samples} samples`)
    expect(samples).toBeGreaterThan(20)
    expect(p99).toBeLessThan(10)
  })
})

describe('memory', () => {
  test('is all given back after 1,000 cycles of make, use and dispose, and the process does not grow', async () => {
    await engine.idle()
    const before = engine.memory().live
    const cycle = async (i: number): Promise<void> => {
      const x = Tensor.from(numbers(4096, 1), [64, 64])
      const y = scope(() => add(matmul(x, x), Tensor.full([64], i)))
      if (i % 10 === 0) await y.read()
      y.dispose()
      x.dispose()
    }
    for (let i = 0; i < 500; i++) await cycle(i)
    await engine.idle()
    const rss = process.memoryUsage.rss()
    for (let i = 0; i < 1000; i++) await cycle(i)
    await engine.idle()
    expect(engine.memory().live).toBe(before)
    expect(before).toBe(0)
    expect((process.memoryUsage.rss() - rss) / 2 ** 20).toBeLessThan(16)
  })

  test('counts what is live and its peak exactly', async () => {
    await engine.idle()
    engine.resetPeak()
    const a = Tensor.zeros([1000])
    const b = Tensor.zeros([500], 'bf16')
    await engine.idle()
    expect(engine.memory()).toMatchObject({ live: 5000, peak: 5000, queued: 0 })
    a.dispose()
    a.dispose()
    await engine.idle()
    expect(engine.memory()).toMatchObject({ live: 1000, peak: 5000 })
    b.dispose()
    await engine.idle()
    expect(engine.memory().live).toBe(0)
  })

  test('of tensors that nobody disposed is freed by the garbage collector', async () => {
    const lines = await runChild('child-engine', ['gc'], { node: ['--expose-gc'] })
    expect(lines).toEqual([`before ${100 * 2 ** 20}`, 'after 0'])
  })

  test('beyond maxMemory is refused with ERR_MEMORY, and what comes next works', async () => {
    const lines = (await runChild('child-engine', ['memory'])).map((line) => JSON.parse(line))
    expect(lines[0]).toMatchObject({
      code: 'ERR_MEMORY',
      message: expect.stringMatching(/67108864 bytes.*maxMemory/),
    })
    expect(lines[1]).toEqual({ next: 0, live: true })
    expect(lines[2]).toEqual({ used: 2 })
  })
})

test.each<[string, () => void, RegExp]>([
  [
    'scalars',
    () => engine.run('binary', [], [], []),
    /binary: expected .* 1 scalars \(kind\), received 0, 0 and 0/,
  ],
  ['outputs', () => engine.run('fill', [], [null, null], [0]), /fill: expected up to 0 inputs and 1 outputs/],
  ['a name', () => engine.run('nothing' as 'fill', [], [], []), /nothing: expected an op of native\/ops.def/],
])('an op called with the wrong %s is refused at once', (_, call, message) => {
  expect(call).toThrow(
    expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringMatching(message) }),
  )
})

describe('a failed op', () => {
  const fail = (): Tensor => {
    const [a, b] = [Tensor.zeros([4]), Tensor.zeros([3])]
    const y = Tensor.empty([4])
    // Past the checks of lib/ops, so that the kernel refuses it.
    engine.run('binary', [a, b], [y], [0])
    a.dispose()
    b.dispose()
    return y
  }

  test('rejects the next wait with its name and shapes, and no later one', async () => {
    const y = fail()
    await expect(engine.idle()).rejects.toMatchObject({
      name: 'PyraflowError',
      code: 'ERR_SHAPE',
      message: expect.stringMatching(/binary.*f32\[4\], f32\[3\]/),
    })
    await engine.idle()
    expect(await Tensor.full([3], 7).floats()).toEqual(Float32Array.of(7, 7, 7))
    y.dispose()
  })

  test('rejects a read that comes after it, and the tensors made before it keep their values', async () => {
    const kept = Tensor.full([2], 5)
    const y = fail()
    await expect(y.read()).rejects.toMatchObject({ code: 'ERR_SHAPE' })
    expect(await kept.floats()).toEqual(Float32Array.of(5, 5))
    y.dispose()
    kept.dispose()
  })

  test('leaves a tensor that was made behind it unusable, which is said', async () => {
    const y = fail()
    const lost = Tensor.zeros([2])
    await expect(engine.idle()).rejects.toMatchObject({ code: 'ERR_SHAPE' })
    await expect(lost.read()).rejects.toMatchObject({ message: expect.stringContaining('earlier error') })
    await engine.idle()
    y.dispose()
    lost.dispose()
  })

  test('does not outlive a cancel', async () => {
    fail().dispose()
    await engine.cancel()
    await engine.idle()
  })
})

test('a cancel tells those who wait for dropped work, and later work runs', async () => {
  const x = Tensor.from(numbers(512 * 512, 1, 0.05), [512, 512])
  const y = scope(() => {
    let product = x
    for (let i = 0; i < 200; i++) product = matmul(product, x)
    return product
  })
  const read = y.read()
  const told = expect(read).rejects.toMatchObject({ name: 'PyraflowError', code: 'ERR_ABORTED' })
  await engine.cancel()
  await told
  expect(engine.memory().queued).toBe(0)
  expect((await x.floats())[0]).toBe(numbers(1, 1, 0.05)[0])
  x.dispose()
  y.dispose()
})

describe('jobs', () => {
  const long = (x: Tensor): Tensor =>
    scope(() => {
      let product = x
      for (let i = 0; i < 100; i++) product = matmul(product, x)
      return product
    })

  test('are cancelled one by one', async () => {
    const x = Tensor.from(numbers(512 * 512, 1, 0.05), [512, 512])
    const [first, second] = [engine.newJob(), engine.newJob()]
    const a = engine.within(first, () => long(x))
    const b = engine.within(second, () => long(x))
    const [stopped, finished] = [a.read(), b.read()]
    const told = expect(stopped).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    await engine.cancel(first)
    await told
    expect(((await finished) as Float32Array).every(Number.isFinite)).toBe(true)
    for (const t of [x, a, b]) t.dispose()
  })

  test('keep their errors to themselves', async () => {
    const [bad, good] = [engine.newJob(), engine.newJob()]
    const x = Tensor.from([1, 2])
    const lost = engine.within(bad, () => {
      const y = Tensor.empty([3])
      engine.run('binary', [x, x], [y], [0])
      return y
    })
    const sum = engine.within(good, () => add(x, x))
    expect(await sum.read()).toEqual(Float32Array.of(2, 4))
    await engine.idle(good)
    // Nor does anybody compute with what the failed op should have written.
    const heir = engine.within(good, () => add(lost, lost))
    await expect(heir.read()).rejects.toMatchObject({ message: expect.stringContaining('earlier error') })
    await expect(lost.read()).rejects.toMatchObject({ code: 'ERR_SHAPE' })
    await expect(lost.read()).rejects.toMatchObject({ message: expect.stringContaining('earlier error') })
    for (const t of [x, lost, sum, heir]) t.dispose()
    await engine.idle()
  })
})

test('a tensor used after dispose is refused at once', () => {
  const x = Tensor.zeros([2, 3])
  x.dispose()
  expect(() => x.storage).toThrow(
    expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringContaining('[2,3]') }),
  )
})

describe('ending', () => {
  test('the process in the midst of work exits at once with its own code', async () => {
    for (const args of [['exit'], ['exit-training', join(folder, 'exit-data')]]) {
      const child = startChild('child-engine', args)
      const { code, signal, stderr } = await child.exit
      const left = Number(/\d+/.exec(child.lines.find((line) => line.startsWith('leaving')) ?? '')?.[0])
      expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: '' })
      expect(Date.now() - left).toBeLessThan(1500)
      const queued = child.lines.find((line) => line.startsWith('queued'))
      if (queued) expect(Number(queued.split(' ')[1])).toBeGreaterThan(100)
    }
  })

  test('workers run engines side by side, and terminating one in the midst of work harms nobody', async () => {
    const lines = await runChild('child-engine', ['workers'])
    expect(lines).toEqual(['same true', ...new Array<string>(4).fill('terminated true'), 'left true'])
  })
})
