import { mkdirSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { againstTorchOps } from './against-torch.ts'
import { attention } from './attention.ts'
import { blocks } from './blocks.ts'
import { dispatch } from './dispatch.ts'
import { full } from './full.ts'
import { generate } from './generate.ts'
import { effortOf, type Group, meets, type Row } from './harness.ts'
import { kernels } from './kernels.ts'
import { describeMachine, slugOf } from './machine.ts'
import { matmul } from './matmul.ts'
import { pyramid } from './pyramid.ts'
import { train } from './train.ts'
import { trainStep } from './train-step.ts'

// Measures the engine against what the machine can do. Tables go to stderr, JSON where it is asked for.
const GROUPS: Record<string, Group> = {
  dispatch,
  matmul,
  pyramid,
  kernels,
  attention,
  blocks,
  torch: againstTorchOps,
  train,
  'train-step': trainStep,
  generate,
  full,
}

const USAGE = `npm run bench -- [options]
  --filter NAME   only the groups whose name contains NAME (${Object.keys(GROUPS).join(', ')})
  --json FILE     write machine and rows as JSON; - is stdout
  --quick         short runs that only show that everything works; the figures mean nothing
  --device NAME   cuda, cuda:N or a CPU level, as PYRAFLOW_BACKEND
  --save          write the JSON to bench/results/<cpu>.json`

function say(text: string): void {
  process.stderr.write(`${text}\n`)
}

function numberText(value: number): string {
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : Math.abs(value) >= 1 ? 2 : 4
  return value.toFixed(digits)
}

function comparisonText({ ratio, against, share }: Row): string {
  if (share !== undefined) return `${(100 * share).toFixed(1)} %`
  return ratio === undefined ? '' : `${ratio.toFixed(2)} × ${against ?? ''}`
}

function boundText(row: Row): string {
  if (!row.required) return ''
  const { atLeast, atMost } = row.required
  const bound = atLeast === undefined ? `≤ ${atMost}` : `≥ ${atLeast.toFixed(2)}`
  return `${bound} ${meets(row) ? 'met' : 'MISSED'}`
}

function table(rows: readonly Row[]): string {
  const cells = rows.map((row) => [
    row.name,
    numberText(row.value),
    row.unit,
    comparisonText(row),
    boundText(row),
  ])
  const widths = [0, 1, 2, 3].map((c) => Math.max(...cells.map((line) => (line[c] as string).length)))
  return cells
    .map((line) =>
      line
        .map((cell, c) => (c === 1 ? cell.padStart(widths[c] as number) : cell.padEnd(widths[c] ?? 0)))
        .join('  ')
        .trimEnd(),
    )
    .map((line) => `  ${line}`)
    .join('\n')
}

async function run(): Promise<number> {
  let args: {
    filter?: string
    json?: string
    quick?: boolean
    save?: boolean
    help?: boolean
    device?: string
  }
  try {
    args = parseArgs({
      options: {
        filter: { type: 'string' },
        json: { type: 'string' },
        quick: { type: 'boolean' },
        save: { type: 'boolean' },
        help: { type: 'boolean' },
        device: { type: 'string' },
      },
    }).values
  } catch (error) {
    say(`${error instanceof Error ? error.message : error}\n${USAGE}`)
    return 2
  }
  if (args.help) {
    say(USAGE)
    return 0
  }
  const { filter = '', quick = false } = args
  if (args.device !== undefined) process.env.PYRAFLOW_BACKEND = args.device
  const chosen = Object.entries(GROUPS).filter(([name]) => name.includes(filter))
  if (chosen.length === 0 || (args.save && (quick || filter !== ''))) {
    say(
      chosen.length === 0
        ? `no group is named like ${filter}`
        : '--save takes a full run: no --quick, no --filter',
    )
    say(USAGE)
    return 2
  }

  const machine = await describeMachine()
  const { cpu, cores, backend, threads, node, onednn, device } = machine
  say(
    `${device ?? cpu}, ${cores} cores; ${backend}, ${threads} threads; Node ${node}; oneDNN ${onednn ?? 'not used'}`,
  )
  const rows: Row[] = []
  for (const [group, measure] of chosen) {
    const begin = performance.now()
    const found = (await measure(effortOf(quick))).map((row) => ({ group, ...row }))
    say(`\n${group} (${((performance.now() - begin) / 1000).toFixed(1)} s)\n${table(found)}`)
    rows.push(...found)
  }
  const missed = rows.filter((row) => !meets(row))
  if (quick) say('\nA quick run: the figures mean nothing.')
  else if (missed.length > 0) say(`\n${missed.length} of the required figures missed.`)

  const text = `${JSON.stringify({ date: new Date().toISOString(), quick, machine, rows }, null, 2)}\n`
  if (args.json === '-') process.stdout.write(text)
  else if (args.json !== undefined) await writeFile(args.json, text)
  if (args.save) {
    const dir = join('bench', 'results')
    mkdirSync(dir, { recursive: true })
    await writeFile(join(dir, `${slugOf(machine)}.json`), text)
  }
  return 0
}

void run().then(
  (code) => {
    process.exitCode = code
  },
  (error: unknown) => {
    say(error instanceof Error ? `bench: ${error.message}` : String(error))
    process.exitCode = 1
  },
)
