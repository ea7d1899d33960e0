import { readFileSync, writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { engine } from '../lib/engine/engine.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { describeMachine } from './machine.ts'

// One generation with a model folder of full size: how long its phases take and how much memory the process has at most.
//   node dist/bench/full-run.js --model DIR [--seconds 5] [--steps 1] [--quantize int8] [--max-memory BYTES] [--json FILE]

/** What happened in one generation; seconds from its beginning, bytes of the process and of the engine. */
export interface FullRun {
  load: number
  loadRss: number
  /** Prompts encoded: the first step follows. */
  firstStep: number
  firstFrame: number
  total: number
  frames: number
  peakRss: number
  /** Of the engine, in all phases. */
  peakEngine: number
  weightsEngine: number
  steps: { unit: number; stage: number; seconds: number; engine: number }[]
  decodes: { frames: number; seconds: number; engine: number }[]
}

/** Most memory that the process has had, in bytes. */
export function peakRss(): number {
  const line = /VmHWM:\s+(\d+) kB/.exec(readFileSync('/proc/self/status', 'utf8'))
  return Number(line?.[1]) * 1024
}

/** Loads and generates, telling `log` what happens. */
export async function fullRun(
  dir: string,
  options: {
    seconds?: number
    frames?: number
    steps?: number
    maxMemory?: number
    quantize?: 'int8' | undefined
    log?: (line: string) => void
  },
): Promise<FullRun> {
  const { steps: each = 1, maxMemory, quantize, log = () => undefined } = options
  const steps = [each, each, each]
  const began = performance.now()
  let last = began
  const lap = (): number => {
    const before = last
    last = performance.now()
    return (last - before) / 1000
  }
  const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(2)} GiB`
  const limit = maxMemory === undefined ? {} : { maxMemory }
  const pipe = await Pipeline.load(dir, { dtype: 'bf16', quantize, promptCache: false, ...limit })
  const load = lap()
  const loadRss = process.memoryUsage.rss()
  const weightsEngine = engine.memory().live
  log(`loaded in ${load.toFixed(1)} s, rss ${gib(loadRss)}, engine ${gib(weightsEngine)}`)
  let peakEngine = 0
  const peak = (): number => {
    const { peak: bytes } = engine.memory()
    peakEngine = Math.max(peakEngine, bytes)
    engine.resetPeak()
    return bytes
  }
  peak()
  const run: FullRun = {
    ...{
      load,
      loadRss,
      weightsEngine,
      firstStep: 0,
      firstFrame: 0,
      total: 0,
      frames: 0,
      peakRss: 0,
      peakEngine: 0,
    },
    steps: [],
    decodes: [],
  }
  try {
    const length =
      options.frames === undefined ? { seconds: options.seconds ?? 5 } : { frames: options.frames }
    const request = { prompt: 'a red fox in the snow', seed: 1, steps, videoSteps: steps, ...length }
    for await (const event of pipe.generate(request)) {
      const seconds = lap()
      const bytes = peak()
      const at = (last - began) / 1000
      if (event.type === 'warning') log(event.message)
      if (event.type === 'progress' && event.phase === 'denoise') {
        run.firstStep ||= at
        const { unit, stage } = event
        run.steps.push({ unit, stage, seconds, engine: bytes })
        log(
          `unit ${unit} stage ${stage}: ${seconds.toFixed(2)} s, engine ${gib(bytes)}, rss ${gib(process.memoryUsage.rss())}`,
        )
      } else if (event.type === 'frames') {
        run.firstFrame ||= at
        run.frames += event.count
        run.decodes.push({ frames: event.count, seconds, engine: bytes })
        log(
          `${event.count} frames: ${seconds.toFixed(2)} s, engine ${gib(bytes)}, rss ${gib(process.memoryUsage.rss())}, at ${at.toFixed(0)} s`,
        )
      }
    }
  } finally {
    pipe.dispose()
  }
  run.total = (performance.now() - began) / 1000
  run.peakRss = peakRss()
  run.peakEngine = peakEngine
  log(
    `${run.frames} frames in ${run.total.toFixed(0)} s, first after ${run.firstFrame.toFixed(0)} s, peak rss ${gib(run.peakRss)}`,
  )
  return run
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      model: { type: 'string' },
      seconds: { type: 'string' },
      frames: { type: 'string' },
      steps: { type: 'string', default: '1' },
      quantize: { type: 'string' },
      'max-memory': { type: 'string' },
      json: { type: 'string' },
    },
  })
  if (values.model === undefined) throw new Error('--model names the folder')
  const { quantize } = values
  if (quantize !== undefined && quantize !== 'int8') throw new Error('--quantize is int8')
  const run = await fullRun(values.model, {
    ...(values.seconds !== undefined && { seconds: Number(values.seconds) }),
    ...(values.frames !== undefined && { frames: Number(values.frames) }),
    ...(values['max-memory'] !== undefined && { maxMemory: Number(values['max-memory']) }),
    steps: Number(values.steps),
    quantize,
    log: (line) => process.stderr.write(`${line}\n`),
  })
  if (values.json === undefined) return
  const machine = await describeMachine()
  writeFileSync(values.json, `${JSON.stringify({ machine, ...run }, null, 2)}\n`)
}

if (process.argv[1]?.endsWith('full-run.js')) {
  main().catch((error: unknown) => {
    process.stderr.write(`${error instanceof Error ? error.stack : error}\n`)
    process.exitCode = 1
  })
}
