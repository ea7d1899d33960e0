import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { expect, onTestFinished, test } from 'vitest'
import type { Result } from '../bench/paper/context.ts'
import { blockExcess, distance, fineEnergy, type Spread, spreadOf } from '../bench/paper/metrics.ts'
import { renoise } from '../lib/ops/renoise.ts'
import { upsample } from '../lib/ops/upsample.ts'
import { Generator } from '../lib/tensor/generator.ts'

const SHAPE = [256, 4, 2, 16, 16]
const generator = new Generator(3)
const white = (name: string) => generator.stream(name).normal(SHAPE)

test('the distance of two draws is small, that of another spread or of blocks is not', async () => {
  const [a, b] = [white('a'), white('b')]
  const floor = await distance(a, b)
  expect(await distance(a, a)).toBe(0)
  expect(floor).toBeLessThan(0.2)
  const wide = generator.stream('wide').normal(SHAPE, { std: 1.5 })
  expect(await distance(wide, b)).toBeGreaterThan(2 * floor)
  const blocks = upsample(generator.stream('blocks').normal([256, 4, 2, 8, 8]))
  expect(await distance(blocks, b)).toBeGreaterThan(3 * floor)
  for (const t of [a, b, wide, blocks]) t.dispose()
})

test('block excess is 0 for white noise, 1 for blocks, and 0 again for blocks that were renoised to white', async () => {
  const noise = white('c')
  const small = generator.stream('d').normal([256, 4, 2, 8, 8])
  const blocks = upsample(small)
  // α = β/√γ·… of spec/method.md §6 for pure noise: α² + β² = 1 and α² = γβ².
  const gamma = 1 / 3
  const beta = Math.sqrt(1 / (1 + gamma))
  const healed = renoise(small, { alpha: Math.sqrt(gamma) * beta, beta, gamma, seed: 1, stream: 2 })
  expect(Math.abs(await blockExcess(noise))).toBeLessThan(0.02)
  expect(await blockExcess(blocks)).toBeGreaterThan(0.95)
  expect(Math.abs(await blockExcess(healed))).toBeLessThan(0.02)
  for (const t of [noise, small, blocks, healed]) t.dispose()
})

test('the finest details of white noise have three quarters of its energy, those of blocks none', async () => {
  const noise = white('e')
  const blocks = upsample(generator.stream('f').normal([256, 4, 2, 8, 8]))
  expect(await fineEnergy(noise)).toBeCloseTo(0.75, 1)
  expect(await fineEnergy(blocks)).toBeLessThan(1e-6)
  for (const t of [noise, blocks]) t.dispose()
})

test('spreads are means and sample deviations', () => {
  expect(spreadOf([1, 2, 3])).toEqual({ mean: 2, std: 1 })
  expect(spreadOf([5])).toEqual({ mean: 5, std: 0 })
})

test('a row of the paper runs from clips to a table, with prompts that nothing was trained on', async () => {
  const dir = mkdtempSync(join(tmpdir(), 'pyraflow-paper-'))
  onTestFinished(() => rmSync(dir, { recursive: true, force: true }))
  const small = ['--row', '1', '--quick', '--samples', '4', '--scored', '2']
  const main = fileURLToPath(new URL('../dist/bench/paper/main.js', import.meta.url))
  await promisify(execFile)(process.execPath, [main, ...small, '--dir', join(dir, 'arms'), '--out', dir])
  const result = JSON.parse(await readFile(join(dir, 'row-1.json'), 'utf8')) as Result
  expect(result.lines.map(({ arm }) => arm)).toEqual(['pyramid', 'full-size'])
  for (const line of result.lines) {
    const { distance, 'shape right': shape } = line as unknown as Record<string, Spread>
    expect(distance?.mean).toBeGreaterThan(0.1)
    expect(shape?.mean).toBeLessThanOrEqual(1)
  }
  expect(result.charts?.map(({ arms }) => arms[0]?.points.length)).toEqual([4, 4])
}, 240_000)
