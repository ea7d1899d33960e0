import { afterAll, describe, expect, test, vi } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { CausalVideoVAE, type VaeRunOptions } from '../lib/models/causal-vae.ts'
import { concat, slice } from '../lib/ops/copy.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { scope } from '../lib/tensor/scope.ts'
import { abortableSteps, sliced } from '../lib/tensor/sliced.ts'
import { drain, noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { numbers, tinyVae } from './fixtures/tiny.ts'
import { relativeL2 } from './golden.ts'

const vae = tinyVae()
afterAll(() => vae.dispose())

const random = (shape: number[], seed = 1): Tensor =>
  Tensor.from(
    numbers(
      shape.reduce((a, b) => a * b, 1),
      seed,
    ),
    shape,
  )

async function taken(make: () => Tensor): Promise<{ values: Float32Array; shape: readonly number[] }> {
  const t = scope(make)
  const values = await t.floats()
  t.dispose()
  return { values, shape: t.shape }
}

const frames = (z: Tensor, start: number, count: number): Tensor => slice(z, 2, start, count)

describe('a clip in chunks', () => {
  test.each([[[1, 1, 1, 1, 1]], [[1, 4]], [[2, 3]], [[3, 1, 1]], [[5]]])(
    'streams the frames of the whole clip: units of %j latent frames',
    async (units) => {
      const z = random([2, 16, 5, 3, 2])
      const before = await live()
      const whole = await taken(() => vae.decode(z))
      expect(whole.shape).toEqual([2, 3, 33, 24, 16])
      const stream = vae.decodeStream()
      let at = 0
      const counts: number[] = []
      const streamed = await taken(() =>
        concat(
          units.map((n) => {
            const part = stream.push(frames(z, at, n))
            at += n
            counts.push(part.shape[2] as number)
            return part
          }),
          2,
        ),
      )
      stream.dispose()
      expect(counts).toEqual(units.map((n, i) => 8 * n - (i === 0 ? 7 : 0)))
      expect(relativeL2(streamed.values, whole.values)).toBeLessThan(1e-5)
      expect(await live()).toBe(before)
      z.dispose()
    },
  )

  test.each([1, 2, 3, 4, 9])(
    'gives the numbers of the whole clip: %i latent frames at once',
    async (window) => {
      const x = random([1, 3, 41, 16, 24])
      const z = random([1, 16, 6, 2, 3], 2)
      const runs: ((options: VaeRunOptions) => Tensor)[] = [
        (options) => vae.encode(x, options).mean,
        (options) => vae.encode(x, options).logvar,
        (options) => vae.decode(z, options),
      ]
      for (const run of runs) {
        const [whole, chunked] = [await taken(() => run({})), await taken(() => run({ window }))]
        expect(chunked.shape).toEqual(whole.shape)
        expect(relativeL2(chunked.values, whole.values)).toBeLessThan(1e-5)
      }
      for (const t of [x, z]) t.dispose()
    },
  )

  test('that is one unit carries nothing to a next one', async () => {
    const z = random([1, 16, 1, 6, 4])
    const before = await live()
    const [single, stream] = [vae.decodeStream({ single: true }), vae.decodeStream()]
    const peaks: number[] = []
    const values: Float32Array[] = []
    for (const one of [single, stream]) {
      engine.resetPeak()
      values.push((await taken(() => one.push(z))).values)
      peaks.push(engine.memory().peak - before)
    }
    expect(values[0]).toEqual(values[1])
    expect(peaks[0] as number).toBeLessThan(0.9 * (peaks[1] as number))
    expect(() => single.push(z)).toThrow(
      expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringMatching(/one unit/) }),
    )
    for (const x of [single, stream, z]) x.dispose()
  })

  test('forgets nothing and knows nothing of later frames', async () => {
    const z = random([1, 16, 4, 2, 2])
    const other = random([1, 16, 4, 2, 2], 7)
    const mixed = scope(() => concat([frames(z, 0, 3), frames(other, 3, 1)], 2))
    const [a, b] = [await taken(() => vae.decode(z)), await taken(() => vae.decode(mixed))]
    const same = 3 * 8 - 7
    const area = 16 * 16
    const upTo = (v: Float32Array, n: number) => v.subarray(0, n * area)
    expect(relativeL2(upTo(b.values, same), upTo(a.values, same))).toBeLessThan(1e-5)
    // A unit decoded without what came before it is another one.
    const stream = vae.decodeStream()
    const alone = await taken(() => stream.push(frames(z, 3, 1)))
    stream.dispose()
    expect(
      relativeL2(alone.values.subarray(0, area), a.values.subarray(24 * area, 25 * area)),
    ).toBeGreaterThan(0.01)
    for (const t of [z, other, mixed]) t.dispose()
  })
})

/** Rows and columns of tile i fade into those of tile i − 1 (spec/vae.md (10)), written out for one axis. */
function fadedTogether(tiles: number[][], keep: number, blend: number): number[] {
  const joined: number[] = []
  tiles.forEach((tile, i) => {
    const before = tiles[i - 1]
    if (before) {
      const count = Math.min(before.length, tile.length, blend)
      for (let y = 0; y < count; y++) {
        tile[y] = before[before.length - count + y]! * (1 - y / count) + tile[y]! * (y / count)
      }
    }
    joined.push(...tile.slice(0, keep))
  })
  return joined
}

describe('a clip in tiles', () => {
  test('is what its tiles are, faded together', async () => {
    // One column of tiles: starts 0, 3, 6 of 8 latent rows.
    const z = random([1, 16, 2, 8, 1])
    const tiled = await taken(() => vae.decode(z, { tile: 32 }))
    expect(tiled.shape).toEqual([1, 3, 9, 64, 8])
    const parts = await Promise.all(
      [0, 3, 6].map((y) => taken(() => vae.decode(slice(z, 3, y, Math.min(4, 8 - y))))),
    )
    const column = (part: { values: Float32Array; shape: readonly number[] }): number[] => {
      const rows = part.shape[3]!
      return Array.from({ length: rows }, (_, y) => part.values[(5 * rows + y) * 8 + 3]!)
    }
    expect(relativeL2(column(tiled), fadedTogether(parts.map(column), 24, 8))).toBeLessThan(1e-5)
    z.dispose()
  })

  test('and in chunks gives the numbers of the tiles alone, streamed or not', async () => {
    const z = random([1, 16, 3, 5, 3])
    const x = random([1, 3, 17, 40, 24], 2)
    const tile = 32
    const tiled = await taken(() => vae.decode(z, { tile }))
    const both = await taken(() => vae.decode(z, { tile, window: 1 }))
    expect(relativeL2(both.values, tiled.values)).toBeLessThan(1e-5)
    const stream = vae.decodeStream({ tile })
    const streamed = await taken(() =>
      concat(
        [0, 1, 2].map((t) => stream.push(frames(z, t, 1))),
        2,
      ),
    )
    stream.dispose()
    expect(relativeL2(streamed.values, tiled.values)).toBeLessThan(1e-5)
    const [mean, chunked] = [
      await taken(() => vae.encode(x, { tile }).mean),
      await taken(() => vae.encode(x, { tile, window: 1 }).mean),
    ]
    expect(relativeL2(chunked.values, mean.values)).toBeLessThan(1e-5)
    // Not larger than the tile: not cut, the same bits.
    const [whole, uncut] = [await taken(() => vae.decode(z)), await taken(() => vae.decode(z, { tile: 64 }))]
    expect(uncut.values).toEqual(whole.values)
    expect(relativeL2(tiled.values, whole.values)).toBeGreaterThan(1e-4)
    for (const t of [x, z]) t.dispose()
  })
})

describe('a memory budget', () => {
  async function peakOf(run: () => Tensor): Promise<number> {
    await engine.idle()
    engine.resetPeak()
    const before = engine.memory().live
    const result = noGrad(run)
    await engine.idle()
    const peak = engine.memory().peak - before
    result.dispose()
    return peak
  }

  test('picks chunks, then tiles, and is kept', async () => {
    const z = random([1, 16, 5, 6, 10])
    const x = random([1, 3, 33, 48, 80], 2)
    for (const [run, plan] of [
      [(o: VaeRunOptions) => vae.decode(z, o), (o: VaeRunOptions) => vae.planDecode(z.shape, o)],
      [(o: VaeRunOptions) => vae.encode(x, o).mean, (o: VaeRunOptions) => vae.planEncode(x.shape, o)],
    ] as const) {
      const whole = await peakOf(() => run({}))
      expect(plan({ maxMemory: 4 * whole })).toEqual({ tile: null, window: null })
      const plans: string[] = []
      const peaks: number[] = []
      for (const share of [4, 0.9, 0.62]) {
        const maxMemory = share * whole
        plans.push(JSON.stringify(plan({ maxMemory })))
        peaks.push(await peakOf(() => run({ maxMemory })))
        expect(peaks.at(-1), `${share} of the whole clip's`).toBeLessThanOrEqual(maxMemory)
      }
      expect(new Set(plans).size, plans.join(' ')).toBeGreaterThan(1)
      expect(peaks[2]).toBeLessThan(0.62 * peaks[0]!)
    }
    for (const t of [x, z]) t.dispose()
  })

  test('that is too small is refused, naming the least', async () => {
    const z = random([1, 16, 3, 4, 4])
    const before = await live()
    let least = 0
    try {
      vae.decode(z, { maxMemory: 1000 })
      expect.unreachable()
    } catch (error) {
      expect(error).toMatchObject({ code: 'ERR_MEMORY', message: expect.stringContaining('maxMemory') })
      least = Number(/at least (\d+)/.exec((error as Error).message)?.[1])
    }
    expect(least).toBeGreaterThan(1000)
    expect(() => vae.planDecode(z.shape, { maxMemory: least - 1 })).toThrow(/at least/)
    expect(vae.planDecode(z.shape, { maxMemory: least })).toEqual({ tile: null, window: 1 })
    expect(await live()).toBe(before)
    z.dispose()
  })

  test('holds for a stream from its first unit on', async () => {
    const z = random([1, 16, 4, 12, 12])
    const unlimited = await peakOf(() => vae.decode(z))
    const maxMemory = 0.65 * unlimited
    const peak = await peakOf(() =>
      scope(() => {
        const stream = vae.decodeStream({ maxMemory })
        for (let t = 0; t < 4; t++) stream.push(frames(z, t, 1)).dispose()
        stream.dispose()
        return Tensor.zeros([1])
      }),
    )
    expect(peak).toBeLessThanOrEqual(maxMemory)
    z.dispose()
  })
})

describe('what does not fit', () => {
  test.each([
    [{ tile: 0 }, /tile: expected a positive multiple of 32 pixels, received 0/],
    [{ tile: 40 }, /tile/],
    [{ tile: 32.5 }, /tile/],
    [{ window: 0 }, /window/],
    [{ window: 1.5 }, /window/],
    [{ maxMemory: 0 }, /maxMemory/],
    [{ maxMemory: Number.NaN }, /maxMemory/],
  ])('is refused: %j', async (pieces, message) => {
    const z = random([1, 16, 2, 2, 2])
    const x = random([1, 3, 9, 16, 16])
    const before = await live()
    const wrong = expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringMatching(message) })
    expect(() => vae.decode(z, pieces)).toThrow(wrong)
    expect(() => vae.encode(x, pieces)).toThrow(wrong)
    expect(() => vae.decodeStream(pieces)).toThrow(wrong)
    expect(await live()).toBe(before)
    for (const t of [x, z]) t.dispose()
  })

  test('units of another size, and pieces while gradients are recorded, are refused', async () => {
    const z = random([1, 16, 1, 2, 2])
    const wider = random([1, 16, 1, 2, 3])
    const stream = vae.decodeStream()
    stream.push(z).dispose()
    expect(() => stream.push(wider)).toThrow(expect.objectContaining({ code: 'ERR_SHAPE' }))
    expect(() => stream.push(random([1, 3, 1, 2, 2]))).toThrow(expect.objectContaining({ code: 'ERR_SHAPE' }))
    stream.push(z).dispose()
    z.requiresGrad = true
    const recorded = expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringMatching(/noGrad/) })
    expect(() => vae.decode(z, { window: 1 })).toThrow(recorded)
    expect(() => stream.push(z)).toThrow(recorded)
    stream.dispose()
    expect(() => stream.push(z)).toThrow(/disposed/)
    for (const t of [z, wider]) t.dispose()
  })
})

describe('decoding in slices', () => {
  test('frees everything when it is aborted in the middle', async () => {
    const z = random([1, 16, 4, 5, 5])
    const before = await live()
    for (const pauses of [0, 3, 25, 40]) {
      for (const streaming of [true, false]) {
        const stop = new AbortController()
        const stream = vae.decodeStream({ tile: 32 })
        const job = engine.newJob()
        let seen = 0
        const run = sliced(
          function* () {
            const inner = streaming ? stream.pushSteps(z) : vae.decodeSteps(z, { tile: 32, window: 1 })
            const steps = abortableSteps(inner, stop.signal)
            for (;;) {
              if (seen++ === pauses) stop.abort()
              const { value, done } = steps.next()
              if (done) return value
              yield
            }
          },
          { grad: false, job },
        )
        await expect(run).rejects.toMatchObject({ code: 'ERR_ABORTED' })
        await engine.cancel(job)
        if (streaming && pauses > 0) expect(() => stream.push(z)).toThrow(/middle of a unit/)
        stream.dispose()
        expect(await live(), `after ${pauses} pauses`).toBe(before)
      }
    }
    z.dispose()
  })

  test('queues little between two pauses, however deep the network and many the pieces', async () => {
    const deep = CausalVideoVAE.create(
      {
        encoder_block_out_channels: [4, 4, 4, 4],
        encoder_layers_per_block: [1, 1, 1, 1],
        encoder_norm_num_groups: 2,
        decoder_block_out_channels: [4, 4, 4, 4],
        decoder_layers_per_block: [8, 8, 8, 8],
        decoder_norm_num_groups: 2,
      },
      { generator: new Generator(1) },
    )
    const z = random([1, 16, 2, 5, 5])
    const ops = vi.spyOn(engine, 'run')
    let most = 0
    let total = 0
    noGrad(() =>
      scope(() => {
        const steps = deep.decodeSteps(z, { tile: 32, window: 1 })
        for (;;) {
          ops.mockClear()
          const { done } = steps.next()
          most = Math.max(most, ops.mock.calls.length)
          total += ops.mock.calls.length
          if (done) break
        }
      }),
    )
    ops.mockRestore()
    expect(total).toBeGreaterThan(500)
    // An op takes some 15 µs to queue.
    expect(most).toBeLessThan(60)
    drain(deep.decodeSteps(z)).dispose()
    await engine.idle()
    for (const t of [z, deep]) t.dispose()
  })
})
