import { join } from 'node:path'
import { PyraflowError } from '../../engine/errors.ts'
import { writeFileAtomically } from '../../io/atomic.ts'
import { svgToPng } from '../../io/svg.ts'
import { type Bin, type Chart, drawCharts } from './chart.ts'
import { metricsPath, type NotedLine, readMetrics } from './metrics.ts'

export interface PlotOptions {
  /** Also draws loss.png. */
  png?: boolean
}

// Beside the loss: its stages (DiT) and terms (VAE). Other metrics are no losses and would need axes of their own.
const PARTS = /^(stage\d+|reconstruction|perception|kl|generator|discriminator)$/
// Finer than this nobody sees.
const MOST_BINS = 512

/** A curve over any number of steps in at most MOST_BINS bins: whenever they are full, neighbours become one. */
class Curve {
  #bins: Bin[] = []
  #width = 1

  add(step: number, value: unknown): void {
    if (typeof value !== 'number' || !Number.isFinite(value)) return
    while (Math.floor(step / this.#width) >= MOST_BINS) this.#halve()
    const at = Math.floor(step / this.#width)
    const bin = this.#bins[at]
    this.#bins[at] = bin ? merged(bin, single(step, value)) : single(step, value)
  }

  #halve(): void {
    this.#width *= 2
    const before = this.#bins
    this.#bins = []
    before.forEach((bin, i) => {
      const at = i >> 1
      const other = this.#bins[at]
      this.#bins[at] = other ? merged(other, bin) : bin
    })
  }

  /** Bins that hold something, in order. */
  get bins(): Bin[] {
    return this.#bins.filter(() => true)
  }
}

const single = (step: number, value: number): Bin => ({ step, value, low: value, high: value, count: 1 })

function merged(a: Bin, b: Bin): Bin {
  const count = a.count + b.count
  const mean = (key: 'step' | 'value'): number => (a[key] * a.count + b[key] * b.count) / count
  return {
    step: mean('step'),
    value: mean('value'),
    low: Math.min(a.low, b.low),
    high: Math.max(a.high, b.high),
    count,
  }
}

/**
 * Draws the curves of a run folder from its metrics.jsonl, also while it goes on: loss and its stages or terms, validation
 * losses and bad steps over a logarithmic axis, below them learning rate and gradient norm.
 *
 * @returns the files written: `loss.svg`, with `png` also `loss.png`
 * @throws ERR_IO when the folder holds no metrics or cannot be written
 */
export async function plotRun(out: string, options: PlotOptions = {}): Promise<string[]> {
  const svg = drawCharts(await charts(out))
  const files = [join(out, 'loss.svg')]
  await writeFileAtomically(files[0] as string, svg)
  if (options.png) {
    files.push(join(out, 'loss.png'))
    await writeFileAtomically(files[1] as string, await svgToPng(svg))
  }
  return files
}

async function charts(out: string): Promise<Chart[]> {
  const losses = new Map<string, Curve>([['loss', new Curve()]])
  const [rate, norm, validation, marks] = [new Curve(), new Curve(), new Curve(), new Curve()]
  const curve = (name: string): Curve => {
    const known = losses.get(name) ?? new Curve()
    losses.set(name, known)
    return known
  }
  const take = (line: NotedLine): void => {
    const { type, step } = line
    if (type === 'validation') validation.add(step, line.loss)
    if (type === 'skipped' || type === 'rollback') marks.add(step, 1)
    if (type !== 'step') return
    rate.add(step, line.learningRate)
    norm.add(step, line.gradNorm)
    for (const name of Object.keys(line))
      if (name === 'loss' || PARTS.test(name)) curve(name).add(step, line[name])
  }
  let any = false
  for await (const { line } of readMetrics(metricsPath(out))) {
    any = true
    take(line)
  }
  if (!any) {
    throw new PyraflowError('ERR_IO', {
      what: metricsPath(out),
      expected: 'the metrics of a run',
      received: 'none',
      remedy: 'Give the folder that a trainer has as its out.',
    })
  }
  const parts = [...losses].map(([name, { bins }], i) => ({ name, bins, band: i === 0 }))
  return [
    {
      title: 'loss',
      height: 360,
      series: [...parts, { name: 'validation', bins: validation.bins, dots: true }],
      marks: marks.bins.map(({ step }) => step),
    },
    { title: 'learning rate', height: 90, series: [{ name: 'learning rate', bins: rate.bins }] },
    { title: 'gradient norm', height: 90, series: [{ name: 'gradient norm', bins: norm.bins, band: true }] },
  ]
}
