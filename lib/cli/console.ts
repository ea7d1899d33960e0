import { writeSync } from 'node:fs'
import { PyraflowError } from '../engine/errors.ts'

/** What the process ends with. */
export const EXIT = { done: 0, failed: 1, usage: 2, interrupted: 130 } as const

/** Options that every subcommand has. */
export interface CommonOptions {
  json?: boolean | string
  progress?: ProgressMode
  backend?: string
  threads?: number
}

export type ProgressMode = 'auto' | 'plain' | 'json' | 'none'

/** A mistake in how the program was called: ends it with exit code 2. */
export class UsageError extends Error {}

/** Text for people: on stderr, so that stdout holds nothing but results. */
export function say(text: string): void {
  process.stderr.write(`${text}\n`)
}

/** A result: on stdout. */
export function result(text: string): void {
  process.stdout.write(`${text}\n`)
}

/** One JSON object on stdout. */
export function resultJson(value: unknown): void {
  result(JSON.stringify(value, finite, 2))
}

/** JSON has no NaN and no infinity; null says that there is no number. */
export function finite(_key: string, value: unknown): unknown {
  return typeof value === 'number' && !Number.isFinite(value) ? null : value
}

const CODES = { red: 31, green: 32, yellow: 33, dim: 2, bold: 1 } as const

/** Colours where a terminal shows them and NO_COLOR does not forbid it. */
export function paint(
  text: string,
  colour: keyof typeof CODES,
  stream: NodeJS.WriteStream = process.stderr,
): string {
  const plain = !stream.isTTY || !!process.env.NO_COLOR || process.env.TERM === 'dumb'
  return plain ? text : `\u001b[${CODES[colour]}m${text}\u001b[0m`
}

/** One line for an error; the stack only when PYRAFLOW_DEBUG is set. Returns the exit code. */
export function explain(error: unknown): number {
  const message = error instanceof Error ? error.message : String(error)
  const debug = !!process.env.PYRAFLOW_DEBUG
  const known = error instanceof PyraflowError
  if (known && error.code === 'ERR_ABORTED') {
    say(`pyraflow: stopped: ${message}`)
    return EXIT.interrupted
  }
  say(`${paint('pyraflow:', 'red')} ${message.replaceAll('\n', ' ')}`)
  if (debug && error instanceof Error) say(error.stack ?? '')
  if (debug && error instanceof Error && error.cause) say(String(error.cause))
  if (error instanceof UsageError || (known && error.code === 'ERR_OPTION')) return EXIT.usage
  return EXIT.failed
}

/**
 * A signal that the first Ctrl-C (or SIGTERM) fires; the second ends the process at once. Files written meanwhile
 * are temporary until complete, so nothing half-written is left under a final name.
 */
export function interruptible(): { signal: AbortSignal; release: () => void } {
  const controller = new AbortController()
  const stop = (): void => {
    if (controller.signal.aborted) {
      // process.stderr may be a pipe that is still draining; this is the last word.
      writeSync(2, 'pyraflow: aborted\n')
      process.exit(EXIT.interrupted)
    }
    say('pyraflow: stopping after this step; press Ctrl-C again to abort at once')
    controller.abort(new Error('interrupted'))
  }
  for (const name of ['SIGINT', 'SIGTERM'] as const) process.on(name, stop)
  return {
    signal: controller.signal,
    release: () => {
      for (const name of ['SIGINT', 'SIGTERM'] as const) process.off(name, stop)
    },
  }
}
