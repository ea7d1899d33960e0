import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { relativeL2 } from '../lib/golden/compare.ts'
import { PastKeys } from '../lib/models/past-keys.ts'
import type { TransformerInputs, VelocityNetwork } from '../lib/models/velocity-network.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { currentTokens } from '../lib/pyramid/current.ts'
import { makeLayout } from '../lib/pyramid/layout.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { drain } from '../lib/tensor/tape.ts'
import type { Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { FAMILIES } from './fixtures/networks.ts'
import { sampledUnits } from './fixtures/sampling.ts'
import { tinyDit, writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'history-cache-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const draw = (seed: number, ...shape: number[]): Tensor => new Generator(seed).normal(shape)

/** Two sequences of two columns, each with history, and padded text. */
function call(): TransformerInputs {
  return {
    columns: [
      [draw(1, 2, 4, 1, 2, 4), draw(2, 2, 4, 2, 4, 8), draw(3, 2, 4, 1, 4, 8)],
      [draw(4, 2, 4, 1, 8, 6), draw(5, 2, 4, 1, 8, 6)],
    ],
    timesteps: [500, 400, 300, 200],
    text: draw(6, 4, 3, 6),
    textMask: [
      [1, 1, 1],
      [1, 0, 0],
      [1, 1, 0],
      [1, 1, 1],
    ],
    pooled: draw(7, 4, 5),
  }
}

const withLast = (inputs: TransformerInputs, seed: number): TransformerInputs => ({
  ...inputs,
  columns: inputs.columns.map((clips, c) => [
    ...clips.slice(0, -1),
    draw(seed + c, ...(clips.at(-1) as Tensor).shape),
  ]),
})

async function velocities(network: VelocityNetwork, inputs: TransformerInputs): Promise<Float32Array[]> {
  const made = network.forward(inputs)
  const values = await Promise.all(made.map((v) => v.floats()))
  for (const v of made) v.dispose()
  return values
}

describe('the tokens of the last clips in front', () => {
  test('every token is there once, with its own mask and rotation', () => {
    const layout = makeLayout({
      columns: [
        { clips: [size(1, 2, 4), size(1, 4, 8)] },
        { clips: [size(2, 2, 2), size(1, 4, 2), size(1, 4, 4)] },
      ],
      ...{ batch: 2, textLength: 3, headAxes: [4, 6, 6], causal: true },
    })
    const { placed, tokens, past, latents } = drain(currentTokens(layout))
    // Patches of the last clips: 2·(8 + 4) of all 2·(2 + 8 + 2 + 2 + 4).
    expect(placed.latentTokens).toBe(24)
    expect(latents).toBe(36)
    expect(past.reduce((n, { count }) => n + count, 0)).toBe(12 + 4 * 3)
    const from = new Array<number>(tokens.segment.length).fill(-1)
    const joint = (c: number, b: number, i: number) => layout.textTokens + layout.latentIndexOf(c, b, i)
    for (const [c, { offset, count }] of layout.predictionTokens.entries()) {
      const clip = placed.columns[c]?.clips[0]
      if (!clip) throw new Error('no clip')
      for (let b = 0; b < 2; b++)
        for (let i = 0; i < count; i++)
          from[clip.rowOffset + b * clip.rowStride + i] = joint(c, b, offset + i)
    }
    for (const run of past) for (let i = 0; i < run.count; i++) from[run.to + i] = run.from + i
    expect([...from].sort((a, b) => a - b)).toEqual(from.map((_, i) => i))
    expect([...tokens.segment]).toEqual(from.map((i) => layout.segment[i]))
    expect([...tokens.order]).toEqual(from.map((i) => layout.order[i]))
    expect([...tokens.jointRows]).toEqual(from.slice(0, 24).map((i) => layout.jointRows[i]))
    for (const name of ['jointCos', 'jointSin'] as const) {
      const row = (a: Float32Array, i: number) => [...a.subarray(8 * i, 8 * i + 8)]
      expect(from.map((_, i) => row(tokens[name], i))).toEqual(from.map((i) => row(layout[name], i)))
    }
    // Text comes last: until there all take the norms of latents.
    expect(from.slice(latents)).toEqual(Array.from({ length: 12 }, (_, i) => i))
  })
})

const size = (frames: number, height: number, width: number) => ({ frames, height, width })

describe.each(['flux', 'mmdit'] as const)('%s', (family) => {
  test.each([
    ['f32', 2e-6],
    ['bf16', 2e-2],
  ] as const)('in %s kept keys and values give what computing everything gives', async (dtype, most) => {
    const network = FAMILIES[family](dtype)
    const inputs = call()
    const layout = network.layout(inputs)
    const keys = new PastKeys(layout)
    const first = await velocities(network, { ...inputs, layout, keep: keys })
    expect(first).toEqual(await velocities(network, { ...inputs, layout }))
    for (const seed of [20, 30]) {
      const next = { ...withLast(inputs, seed), layout }
      const whole = await velocities(network, next)
      const reused = await velocities(network, { ...next, past: keys })
      for (const [c, v] of reused.entries()) {
        expect(relativeL2(v, whole[c] as Float32Array)).toBeLessThan(most)
        expect(relativeL2(v, first[c] as Float32Array)).toBeGreaterThan(0.03)
      }
    }
    keys.dispose()
  })
})

describe('calls that cannot be', () => {
  const inputs = call()
  const network = FAMILIES.flux()
  const layout = network.layout(inputs)
  const forward = (more: Partial<TransformerInputs>) => () => network.forward({ ...inputs, layout, ...more })

  test.each<[string, () => unknown, string]>([
    ['past before anything was kept', forward({ past: new PastKeys(layout) }), 'ERR_OPTION'],
    ['both at once', forward({ past: new PastKeys(layout), keep: new PastKeys(layout) }), 'ERR_OPTION'],
    ['keys of another layout', forward({ keep: new PastKeys(network.layout(inputs)) }), 'ERR_SHAPE'],
    [
      'a column without history',
      () => new PastKeys(network.layout({ ...inputs, columns: [[inputs.columns[0]?.[0] as Tensor]] })),
      'ERR_SHAPE',
    ],
    [
      'a layout without causality',
      () => new PastKeys(network.layout({ ...inputs, causal: false })),
      'ERR_OPTION',
    ],
  ])('%s', (_, run, code) => {
    expect(run).toThrow(expect.objectContaining({ code }))
  })

  test('a network that trains', () => {
    const training = tinyDit({ train: true })
    const own = { columns: [[draw(1, 1, 16, 1, 4, 4), draw(2, 1, 16, 1, 4, 4)]], timesteps: [1] }
    const given = { ...own, text: draw(3, 1, 2, 12), pooled: draw(4, 1, 12) }
    const keep = new PastKeys(training.layout(given))
    const run = () => training.forward({ ...given, layout: keep.layout, keep })
    expect(run).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
    training.dispose()
  })
})

describe('sampling', () => {
  let pipe: Pipeline
  beforeAll(async () => {
    await writePipeline(join(folder, 'model'))
    pipe = await Pipeline.load(join(folder, 'model'))
  })
  afterAll(() => pipe.dispose())

  const sample = (
    historyCache: number,
    repeat = true,
    more: { frames?: number; historyWindow?: number } = {},
  ): Promise<Float32Array[]> =>
    sampledUnits(pipe.transformer, { videoSteps: [4, 1, 5], historyCache, repeat, ...more })

  test('is close to that without, repeats its steps to the same bits, and frees it all', async () => {
    const exact = await sample(1)
    const before = await live()
    for (const every of [2, 100]) {
      const cached = await sample(every)
      expect(cached).toEqual(await sample(every, false))
      expect(cached[0]).toEqual(exact[0])
      for (const unit of [1, 2]) {
        const difference = relativeL2(cached[unit] as Float32Array, exact[unit] as Float32Array)
        expect(difference).toBeGreaterThan(0)
        expect(difference).toBeLessThan(0.05)
      }
    }
    expect(await live()).toBe(before)
  })

  test('within a window leaves out what is older, but for the first frame', async () => {
    const all = await sample(1, true, { frames: 4 })
    const window = await sample(1, true, { frames: 4, historyWindow: 2 })
    // Unit 2 sees the first frame and unit 1; unit 3 is the first that has more than fits.
    expect(window.slice(0, 3)).toEqual(all.slice(0, 3))
    const narrow = await sample(1, true, { frames: 4, historyWindow: 1 })
    expect(narrow.slice(0, 3)).toEqual(all.slice(0, 3))
    expect(narrow[3]).not.toEqual(all[3])
    expect(await sample(2, true, { frames: 4, historyWindow: 1 })).toEqual(
      await sample(2, false, { frames: 4, historyWindow: 1 }),
    )
    await expect(sample(1, true, { historyWindow: 0 })).rejects.toMatchObject({ code: 'ERR_OPTION' })
  })

  test.each([0, 1.5, Number.NaN])('%d steps are refused', async (every) => {
    await expect(sample(every)).rejects.toMatchObject({ code: 'ERR_OPTION' })
  })
})
