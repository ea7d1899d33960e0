import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { writeFileAtomically } from '../../lib/io/atomic.ts'
import { type Bin, drawCharts } from '../../lib/train/run/chart.ts'
import { describeMachine } from '../machine.ts'
import type { Budget, Line, Result } from './context.ts'
import type { Spread } from './metrics.ts'
import { ROWS } from './rows.ts'
import { floorOf } from './sampling.ts'
import { openWorld } from './world.ts'

// The claims of the paper, measured small: node dist/bench/paper/main.js --row 3
const USAGE = `npm run bench:paper -- --row N [options]
  --row N         one of ${Object.keys(ROWS).join(', ')}; may be given several times
  --seeds N       seeds of every arm, 3
  --steps N       training steps of arms that begin with nothing, 200
  --tuned N       training steps of arms that begin with the toy model, 60
  --points N      how often an arm that begins with nothing is measured, 4
  --samples N     pictures or videos that distances are taken over, 64
  --scored N      videos that the scorer reads, 16
  --dir DIR       latents and finished arms, runs/paper: an arm that is there is not trained again
  --out DIR       results, bench/results/paper
  --quick         a few steps that only show that everything runs`

const say = (line: string): void => void process.stderr.write(`${line}\n`)

async function main(): Promise<number> {
  const number = { type: 'string' } as const
  const { values } = parseArgs({
    options: {
      row: { type: 'string', multiple: true },
      ...{ seeds: number, steps: number, tuned: number, points: number, samples: number, scored: number },
      dir: { type: 'string', default: 'runs/paper' },
      out: { type: 'string', default: 'bench/results/paper' },
      quick: { type: 'boolean', default: false },
    },
  })
  const rows = values.row ?? []
  if (rows.length === 0 || rows.some((row) => !ROWS[row])) {
    say(USAGE)
    return 2
  }
  const { quick, dir, out } = values
  const of = (
    name: 'seeds' | 'steps' | 'tuned' | 'points' | 'samples' | 'scored',
    real: number,
    short: number,
  ) => Number(values[name] ?? (quick ? short : real))
  const budget: Budget = {
    seeds: Array.from({ length: of('seeds', 3, 1) }, (_, i) => i),
    steps: of('steps', 200, 4),
    tunedSteps: of('tuned', 60, 4),
    points: of('points', 4, 4),
    samples: of('samples', 64, 8),
    scored: of('scored', 16, 2),
  }
  await mkdir(dir, { recursive: true })
  await mkdir(out, { recursive: true })
  const counts = { train: quick ? 24 : 800, unseen: budget.samples, scored: budget.scored }
  const world = await openWorld(dir, counts, say)
  try {
    const floor = await floorOf(world, budget.samples)
    say(`distance of real clips from other real ones: ${JSON.stringify(floor)}`)
    for (const row of rows) {
      const began = performance.now()
      const result = await (ROWS[row] as (typeof ROWS)[string])({ world, budget, dir, say })
      const seconds = (performance.now() - began) / 1000
      const machine = await describeMachine()
      const text = JSON.stringify({ ...result, floor, budget, seconds, machine, quick }, null, 2)
      await writeFileAtomically(join(out, `row-${row}.json`), `${text}\n`)
      if (result.charts) await writeFileAtomically(join(out, `row-${row}.svg`), plot(result))
      say(`\nRow ${row}: ${result.claim}\n${table(result.lines)}\n${result.verdict}`)
    }
  } finally {
    world.dispose()
  }
  return 0
}

/** The lines as a table in Markdown. */
function table(lines: readonly Line[]): string {
  const columns = Object.keys(lines[0] ?? {})
  const cell = (value: Spread | string | number | undefined): string => {
    if (typeof value === 'string') return value
    if (typeof value === 'number') return value.toPrecision(3)
    return value ? `${value.mean.toPrecision(3)} ± ${value.std.toPrecision(1)}` : ''
  }
  const row = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`
  return [
    row(columns),
    row(columns.map(() => '---')),
    ...lines.map((line) => row(columns.map((name) => cell(line[name])))),
  ].join('\n')
}

function plot({ charts = [], row }: Result): string {
  return drawCharts(
    charts.map(({ x, y, arms }) => ({
      title: `row ${row}: ${y} against G${x}`,
      height: 220,
      series: arms.map(({ name, points }) => ({
        name,
        band: true,
        dots: true,
        bins: points.map(
          (point): Bin => ({
            step: Math.round(point.x / 1e9),
            value: point.y.mean,
            low: point.y.mean - point.y.std,
            high: point.y.mean + point.y.std,
            count: 1,
          }),
        ),
      })),
    })),
  )
}

main().then(
  (code) => {
    process.exitCode = code
  },
  (error: unknown) => {
    say(error instanceof Error ? `${error.stack}` : String(error))
    process.exitCode = 1
  },
)
