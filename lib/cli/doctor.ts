import type { Command } from 'commander'
import { z } from 'zod'
import type { DatasetReport, Finding } from '../train/inspect.ts'
import { type CommonOptions, EXIT, interruptible, paint, result, resultJson, say } from './console.ts'
import { addDataOptions, bucketsIn, dataFlags, dataSettings } from './data-settings.ts'
import { duration, makeProgress } from './progress.ts'
import { common, configureEngine, option, resolveSettings, wholeNumber } from './settings.ts'

const settings = z.strictObject({
  ...dataSettings,
  vae: z.string().optional(),
  limit: z.int().positive().optional(),
})

interface DoctorFlags extends CommonOptions {
  config?: string
}

export function addDoctor(program: Command): void {
  const doctor = program.command('doctor').description('look for what would spoil a run, before it begins')
  const command = doctor
    .command('data')
    .description('open every clip of a data set and name what cannot be used or looks wrong')
    .argument('<data>', 'folder with captions.jsonl and clips, or the JSONL itself')
    .option('--config <file>', 'settings as JSON')
  addDataOptions(command)
  option(command, '--vae <dir>', 'folder of the causal VAE: measures how long encoding will take')
  option(command, '--limit <n>', 'look at the first entries only', wholeNumber)
  common(command).action(run)
}

async function run(data: string, flags: DoctorFlags, command: Command): Promise<void> {
  const s = resolveSettings(settings, command, flags.config, dataFlags)
  const buckets = bucketsIn(s)
  if (s.vae !== undefined) await configureEngine(flags)
  const { inspectDataset } = await import('../train/inspect.ts')
  const { signal, release } = interruptible()
  const progress = makeProgress(flags.progress)
  const began = performance.now()
  const vae =
    s.vae === undefined
      ? undefined
      : await (await import('../models/causal-vae.ts')).CausalVideoVAE.fromPretrained(s.vae, {
          dtype: s.dtype,
        })
  let report: DatasetReport
  try {
    report = await inspectDataset(data, {
      ...{ buckets, fps: s.fps, short: s.short, limit: s.limit, vae, signal },
      onProgress: (done, total) => {
        const etaMs = ((performance.now() - began) / done) * (total - done)
        progress.update({ label: 'looked at', done, total, etaMs })
      },
    })
  } finally {
    progress.end()
    release()
    vae?.dispose()
  }
  if (flags.json) resultJson(report)
  else for (const line of describe(report)) result(line)
  say(`pyraflow: ${report.errors} errors, ${report.warnings} warnings`)
  if (report.errors > 0) process.exitCode = EXIT.failed
}

function describe(report: DatasetReport): string[] {
  const { entries, usable, findings, rates, buckets, cache, encoding } = report
  const line = ({ severity, kind, place, message }: Finding): string => {
    const label = paint(severity.padEnd(8), severity === 'error' ? 'red' : 'yellow', process.stdout)
    return `${label} ${kind.padEnd(10)} ${message.includes(place) ? message : `${place}: ${message}`}`
  }
  const size = (bytes: number): string =>
    bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(2)} GiB`
  return [
    ...findings.map(line),
    `entries    ${entries}: ${usable.videos} videos and ${usable.images} pictures can be used`,
    `rates      ${rates.map(({ fps, clips }) => `${fps} fps in ${clips}`).join(', ') || 'no videos'}`,
    ...buckets.map((b) => `bucket     ${b.width}×${b.height}×${b.frames}: ${b.clips}`),
    cache
      ? `cache      ${size(cache.bytes)} (${cache.how})`
      : 'cache      not known: give the sizes to train at',
    encoding
      ? `encoding   about ${duration(1000 * encoding.seconds)} (${encoding.how})`
      : 'encoding   not known: give --vae and the sizes to train at',
  ]
}
