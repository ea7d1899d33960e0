import { type ProgressMode, paint } from './console.ts'

/** One state of something long. */
export interface Status {
  readonly label: string
  readonly done: number
  readonly total: number
  /** Shown behind the numbers. */
  readonly detail?: string | undefined
  readonly etaMs?: number | undefined
}

/** Shows how far something long is; `end` leaves the terminal as it was. */
export interface Progress {
  update(status: Status): void
  end(): void
}

const BAR = 24
const REDRAW_MS = 80
const PLAIN_MS = 5000

/**
 * A bar that redraws itself on a terminal, a line every few seconds elsewhere (`plain`), one JSON object a line
 * (`json`), or nothing. All of it on stderr.
 */
export function makeProgress(
  mode: ProgressMode = 'auto',
  stream: NodeJS.WriteStream = process.stderr,
): Progress {
  if (mode === 'none') return { update: () => undefined, end: () => undefined }
  if (mode === 'json') {
    const update = (status: Status): void =>
      void stream.write(`${JSON.stringify({ type: 'progress', ...status })}\n`)
    return { update, end: () => undefined }
  }
  return mode === 'auto' && stream.isTTY ? bar(stream) : lines(stream)
}

function lines(stream: NodeJS.WriteStream): Progress {
  let label = ''
  let last = Number.NEGATIVE_INFINITY
  return {
    update: (status) => {
      const now = performance.now()
      const due = status.label !== label || status.done === status.total || now - last >= PLAIN_MS
      if (!due) return
      label = status.label
      last = now
      stream.write(`${describe(status)}\n`)
    },
    end: () => undefined,
  }
}

function bar(stream: NodeJS.WriteStream): Progress {
  let last = Number.NEGATIVE_INFINITY
  let drawn = false
  return {
    update: (status) => {
      const now = performance.now()
      if (now - last < REDRAW_MS && status.done < status.total) return
      last = now
      drawn = true
      const share = status.total > 0 ? Math.min(status.done / status.total, 1) : 0
      const filled = Math.round(share * BAR)
      const text = `${'█'.repeat(filled)}${'░'.repeat(BAR - filled)} ${describe(status)}`
      stream.write(`\r\u001b[2K${paint(text.slice(0, (stream.columns || 100) - 1), 'bold', stream)}`)
    },
    end: () => {
      if (drawn) stream.write('\r\u001b[2K')
      drawn = false
    },
  }
}

function describe({ label, done, total, detail, etaMs }: Status): string {
  const parts = [`${label} ${done}/${total}`]
  if (detail) parts.push(detail)
  if (etaMs !== undefined && Number.isFinite(etaMs) && done < total) parts.push(`${duration(etaMs)} left`)
  return parts.join(' · ')
}

/** 950 ms → "1 s", 75 s → "1 min 15 s". */
export function duration(ms: number): string {
  const seconds = Math.max(0, Math.round(ms / 1000))
  if (seconds < 60) return `${seconds} s`
  const minutes = Math.floor(seconds / 60)
  return minutes < 60
    ? `${minutes} min ${seconds % 60} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`
}
