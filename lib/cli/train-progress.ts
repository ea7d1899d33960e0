import type { TrainEvent } from '../train/run.ts'
import { type ProgressMode, say } from './console.ts'
import { makeProgress } from './progress.ts'

export interface Done {
  out: string
  model: string
  steps: number
  /** Mean over the last steps; null when a resumed run had none left. */
  loss: number | null
  seconds: number
}

/** Shows events as progress; the loss is averaged over a few steps because single ones are noisy. */
export async function follow(
  events: AsyncIterable<TrainEvent>,
  s: { out: string; steps: number },
  mode: ProgressMode | undefined,
): Promise<Omit<Done, 'model'>> {
  const progress = makeProgress(mode)
  const began = performance.now()
  const recent: number[] = []
  let first = 0
  try {
    for await (const event of events) {
      if (event.type === 'resume') first = event.step
      if (event.type !== 'step') {
        const line = mode === 'json' ? JSON.stringify(event) : describe(event)
        if (mode === 'none' || !line) continue
        progress.end()
        say(line)
        continue
      }
      recent.push(event.loss)
      if (recent.length > 20) recent.shift()
      const etaMs = ((performance.now() - began) / (event.step - first)) * (s.steps - event.step)
      progress.update({
        label: 'step',
        done: event.step,
        total: s.steps,
        detail: `loss ${average(recent).toPrecision(4)} · ${event.seconds.toFixed(2)} s`,
        etaMs,
      })
    }
  } finally {
    progress.end()
  }
  const seconds = (performance.now() - began) / 1000
  return { out: s.out, steps: s.steps, loss: recent.length > 0 ? average(recent) : null, seconds }
}

/** One line for an event that is worth a line of its own. */
function describe(event: TrainEvent): string | undefined {
  const words = inWords(event)
  return words && `pyraflow: ${words}`
}

function inWords(event: TrainEvent): string | undefined {
  const step = `step ${event.step}`
  if (event.type === 'resume') return `resuming after ${step}`
  if (event.type === 'skipped')
    return `${step} skipped: ${event.culprit ? `no finite ${event.culprit}` : `loss ${event.loss.toPrecision(4)}`}`
  if (event.type === 'rollback')
    return `${step}: no finite ${event.culprit}; back to the weights of step ${event.to}`
  if (event.type === 'samples') return `${step}: samples ${event.files.join(', ')}`
  if (event.type === 'best') return `${step}: best validation loss so far, kept in ${event.path}`
  if (event.type !== 'validation') return undefined
  const { type: _, step: __, loss, ...rest } = event
  const numbers = Object.entries({ loss, ...rest }).map(([name, value]) =>
    typeof value === 'number' ? `${name} ${value.toPrecision(4)}` : `${name} ${value}`,
  )
  return `${step}: validation ${numbers.join(', ')}`
}

const average = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length
