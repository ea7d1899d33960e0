import { SANS } from '../../io/svg.ts'

/** Values of neighbouring steps, drawn as one point. */
export interface Bin {
  readonly step: number
  /** Mean of the values. */
  readonly value: number
  readonly low: number
  readonly high: number
  readonly count: number
}

export interface Series {
  readonly name: string
  readonly bins: readonly Bin[]
  /** Shades the range of the values behind their mean. */
  readonly band?: boolean
  readonly dots?: boolean
}

/** Curves over one logarithmic axis; values of 0 and below are left out. */
export interface Chart {
  readonly title: string
  readonly height: number
  readonly series: readonly Series[]
  /** Steps to mark at the lower edge. */
  readonly marks?: readonly number[]
}

const WIDTH = 900
const LEFT = 70
const RIGHT = 150
const TOP = 26
const BETWEEN = 46
const COLOURS = ['#2563eb', '#d97706', '#059669', '#db2777', '#7c3aed', '#0891b2', '#65a30d', '#dc2626']
const GREY = '#6b7280'

type Scale = (value: number) => number

const round = (value: number): string => value.toFixed(1)
const line = (x1: number, y1: number, x2: number, y2: number, style: string): string =>
  `<line x1="${round(x1)}" y1="${round(y1)}" x2="${round(x2)}" y2="${round(y2)}" ${style}/>`
const text = (x: number, y: number, words: string, style = ''): string =>
  `<text x="${round(x)}" y="${round(y)}" ${style}>${words}</text>`
const path = (points: readonly (readonly [number, number])[], style: string): string =>
  `<path d="M${points.map(([x, y]) => `${round(x)} ${round(y)}`).join('L')}" ${style}/>`

/** Charts one below the other over the same steps, as SVG. */
export function drawCharts(charts: readonly Chart[]): string {
  const all = charts.flatMap(({ series }) => series.flatMap(({ bins }) => bins))
  const last = all.reduce((most, { step }) => Math.max(most, step), 1)
  const x: Scale = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / last
  let top = TOP
  const drawn = charts.map((chart) => {
    const svg = drawChart(chart, top, x, last)
    top += chart.height + BETWEEN
    return svg
  })
  const font = `font-family="${SANS}" font-size="12"`
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${top}" viewBox="0 0 ${WIDTH} ${top}" ${font}>
<rect width="100%" height="100%" fill="#fff"/>
${drawn.join('\n')}
</svg>
`
}

function drawChart(chart: Chart, top: number, x: Scale, last: number): string {
  const bottom = top + chart.height
  const shown = chart.series.map((s) => ({ ...s, bins: s.bins.filter(({ low }) => low > 0) }))
  const lows = shown.flatMap(({ bins, band }) => bins.map((bin) => (band ? bin.low : bin.value)))
  const highs = shown.flatMap(({ bins, band }) => bins.map((bin) => (band ? bin.high : bin.value)))
  const extreme = (values: number[], pick: (a: number, b: number) => number): number =>
    values.length > 0 ? values.reduce((a, b) => pick(a, b)) : 1
  // A flat curve needs a range all the same.
  const from = Math.log10(extreme(lows, Math.min) / 1.1)
  const to = Math.log10(extreme(highs, Math.max) * 1.1)
  const y: Scale = (value) => bottom - ((Math.log10(value) - from) / (to - from)) * chart.height
  const parts = [text(LEFT, top - 8, chart.title, 'font-weight="bold"')]
  for (const value of ticks(from, to, chart.height)) {
    parts.push(line(LEFT, y(value), WIDTH - RIGHT, y(value), 'stroke="#e5e7eb"'))
    parts.push(text(LEFT - 6, y(value) + 4, label(value), `text-anchor="end" fill="${GREY}"`))
  }
  for (const step of stepTicks(last)) {
    parts.push(line(x(step), bottom, x(step), bottom + 4, `stroke="${GREY}"`))
    parts.push(text(x(step), bottom + 17, String(step), `text-anchor="middle" fill="${GREY}"`))
  }
  parts.push(line(LEFT, bottom, WIDTH - RIGHT, bottom, `stroke="${GREY}"`))
  for (const step of chart.marks ?? [])
    parts.push(line(x(step), bottom - 10, x(step), bottom, 'stroke="#dc2626" stroke-width="2"'))
  shown.forEach((series, i) => {
    if (series.bins.length === 0) return
    const colour = COLOURS[i % COLOURS.length] as string
    parts.push(drawSeries(series, x, y, colour))
    // The title says it.
    if (shown.length === 1) return
    const at = top + 8 + 18 * i
    parts.push(line(WIDTH - RIGHT + 12, at, WIDTH - RIGHT + 32, at, `stroke="${colour}" stroke-width="3"`))
    parts.push(text(WIDTH - RIGHT + 38, at + 4, series.name))
  })
  return parts.join('\n')
}

function drawSeries({ bins, band, dots }: Series, x: Scale, y: Scale, colour: string): string {
  const at = bins.map(({ step, value }) => [x(step), y(value)] as const)
  const parts: string[] = []
  if (band) {
    const edge = [
      ...bins.map(({ step, high }) => [x(step), y(high)] as const),
      ...bins.toReversed().map(({ step, low }) => [x(step), y(low)] as const),
    ]
    parts.push(path(edge, `fill="${colour}" fill-opacity="0.15"`))
  }
  parts.push(path(at, `fill="none" stroke="${colour}" stroke-width="${band ? 2 : 1.3}"`))
  if (dots || bins.length === 1)
    parts.push(
      ...at.map(([cx, cy]) => `<circle cx="${round(cx)}" cy="${round(cy)}" r="3" fill="${colour}"/>`),
    )
  return parts.join('\n')
}

/** Powers of ten in a range of logarithms; with 2 and 5 between them where they are few. */
function ticks(from: number, to: number, height: number): number[] {
  const factors = to - from < height / 80 ? [1, 2, 5] : [1]
  const fine = to - from < 0.5 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : factors
  const values: number[] = []
  for (let power = Math.floor(from); power <= Math.ceil(to); power++)
    for (const factor of fine) values.push(factor * 10 ** power)
  return values.filter((value) => Math.log10(value) >= from && Math.log10(value) <= to)
}

const label = (value: number): string =>
  value >= 0.001 && value < 10_000 ? String(Number(value.toPrecision(3))) : value.toExponential(0)

/** About six round steps from 0 to the last. */
function stepTicks(last: number): number[] {
  const power = 10 ** Math.floor(Math.log10(last / 6 || 1))
  const width = Math.max(1, [1, 2, 5, 10].map((f) => f * power).find((w) => last / w <= 7) as number)
  return Array.from({ length: Math.floor(last / width) + 1 }, (_, i) => i * width)
}
