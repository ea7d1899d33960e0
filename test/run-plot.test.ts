import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, expect, test } from 'vitest'
import { readMetrics } from '../lib/train/run/metrics.ts'
import { plotRun } from '../lib/train/run.ts'

const folder = mkdtempSync(join(tmpdir(), 'run-plot-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** A run folder whose metrics are the given lines. */
function runOf(name: string, lines: readonly object[]): string {
  const out = join(folder, name)
  mkdirSync(out)
  writeFileSync(join(out, 'metrics.jsonl'), lines.map((line) => `${JSON.stringify(line)}\n`).join(''))
  return out
}

function steps(count: number): object[] {
  return Array.from({ length: count }, (_, i) => {
    const loss = 2 / Math.sqrt(i + 1)
    return {
      type: 'step',
      step: i + 1,
      loss,
      stage0: 2 * loss,
      stage1: loss / 2,
      learningRate: 1e-3,
      gradNorm: loss,
    }
  })
}

const svgOf = (out: string): string => readFileSync(join(out, 'loss.svg'), 'utf8')
/** Points of the curves, each a list of [x, y]. */
const curves = (svg: string): number[][][] =>
  [...svg.matchAll(/<path d="M([^"]*)" fill="none"/g)].map(([, d]) =>
    (d as string).split('L').map((point) => point.split(' ').map(Number)),
  )

test('loss, stages, validation, learning rate and gradient norm are drawn, bad steps are marked', async () => {
  const out = runOf('all', [
    ...steps(30),
    { type: 'skipped', step: 31, loss: null },
    { type: 'validation', step: 31, loss: 0.4 },
    { type: 'rollback', step: 32, to: 30, culprit: 'loss' },
    { type: 'validation', step: 32, loss: 0.3 },
  ])
  expect(await plotRun(out)).toEqual([join(out, 'loss.svg')])
  const svg = svgOf(out)
  for (const name of ['loss', 'stage0', 'stage1', 'validation', 'learning rate', 'gradient norm'])
    expect(svg).toContain(`>${name}</text>`)
  expect(curves(svg)).toHaveLength(6)
  expect(svg.match(/stroke="#dc2626" stroke-width="2"/g)).toHaveLength(2)
  expect(svg.match(/<circle/g)).toHaveLength(2)
  expect(svg).not.toMatch(/NaN|Infinity|undefined/)
})

test('the loss axis is logarithmic: equal factors are equal distances', async () => {
  const losses = [8, 4, 2, 1]
  const lines = losses.map((loss, i) => ({ type: 'step', step: i + 1, loss, learningRate: 1, gradNorm: 1 }))
  const out = runOf('log', lines)
  await plotRun(out)
  const ys = (curves(svgOf(out))[0] as number[][]).map(([, y]) => y as number)
  const gaps = ys.slice(1).map((y, i) => y - (ys[i] as number))
  expect(gaps[0]).toBeGreaterThan(50)
  for (const gap of gaps) expect(Math.abs(gap - (gaps[0] as number))).toBeLessThan(0.3)
})

test('a long run is drawn in a few hundred points whose means keep the curve, and blocks nobody', async () => {
  const count = 60_000
  const out = runOf('long', steps(count))
  let [turns, going] = [0, true]
  const turn = (): void => {
    turns++
    if (going) setImmediate(turn)
  }
  setImmediate(turn)
  await plotRun(out)
  going = false
  const [loss] = curves(svgOf(out)) as [number[][]]
  expect(loss.length).toBeGreaterThan(200)
  expect(loss.length).toBeLessThanOrEqual(512)
  expect(svgOf(out).length).toBeLessThan(200_000)
  const xs = loss.map(([x]) => x as number)
  expect(xs).toEqual([...xs].sort((a, b) => a - b))
  // Some 9 MB in pieces of 32 kB.
  expect(turns).toBeGreaterThan(200)
})

test('loss.png is the same picture, and both are drawn while the run goes on', async () => {
  const out = runOf('png', steps(50))
  // A line that is being written.
  writeFileSync(join(out, 'metrics.jsonl'), '{"type":"step","st', { flag: 'a' })
  expect(await plotRun(out, { png: true })).toEqual(['loss.svg', 'loss.png'].map((name) => join(out, name)))
  const { width, height } = await sharp(join(out, 'loss.png')).metadata()
  expect({ width, height }).toEqual({ width: 900, height: 704 })
  const { channels } = await sharp(join(out, 'loss.png')).stats()
  expect(Math.max(...channels.map(({ stdev }) => stdev))).toBeGreaterThan(5)
  expect(readdirSync(out).sort()).toEqual(['loss.png', 'loss.svg', 'metrics.jsonl'])
})

test('a folder without metrics is named', async () => {
  await expect(plotRun(join(folder, 'nowhere'))).rejects.toMatchObject({
    code: 'ERR_IO',
    message: expect.stringMatching(/nowhere.metrics\.jsonl.*none/),
  })
})

test('lines of metrics are read with the byte at which each ends, up to the first that is none', async () => {
  const path = join(folder, 'lines.jsonl')
  const good = ['{"type":"step","step":1,"name":"größer"}', '{"type":"step","step":2}']
  writeFileSync(path, `${good.join('\n')}\n{"step":3}\n${good[0]}\n`)
  const found: [number, number][] = []
  for await (const { line, end } of readMetrics(path)) found.push([line.step, end])
  const first = Buffer.byteLength(`${good[0]}\n`)
  expect(found).toEqual([
    [1, first],
    [2, first + (good[1] as string).length + 1],
  ])
})
