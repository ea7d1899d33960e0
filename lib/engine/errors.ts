/** What went wrong, for programs; the message is for people. */
export type ErrorCode =
  | 'ERR_SHAPE'
  | 'ERR_DTYPE'
  | 'ERR_OPTION'
  | 'ERR_CHECKPOINT'
  | 'ERR_IO'
  | 'ERR_MEMORY'
  | 'ERR_DEVICE'
  | 'ERR_ABORTED'
  | 'ERR_NUMERICS'

export interface ErrorDetails {
  /** The op, option, file or tensor at fault. */
  what: string
  expected?: string | undefined
  received?: string | undefined
  /** What the caller can do about it. */
  remedy?: string | undefined
  cause?: unknown
}

/** The one error class of the package: `code` to switch on, the rest to read. */
export class PyraflowError extends Error {
  readonly code: ErrorCode
  readonly expected: string | undefined
  readonly received: string | undefined
  readonly remedy: string | undefined

  constructor(code: ErrorCode, details: ErrorDetails) {
    let message = details.what
    if (details.expected !== undefined) message += `: expected ${details.expected}`
    if (details.received !== undefined)
      message += `${details.expected === undefined ? ': ' : ', '}received ${details.received}`
    if (details.remedy !== undefined) message += `. ${details.remedy}`
    super(message, details.cause === undefined ? undefined : { cause: details.cause })
    this.name = 'PyraflowError'
    this.code = code
    this.expected = details.expected
    this.received = details.received
    this.remedy = details.remedy
  }
}

/** Throws ERR_ABORTED when the signal has fired; call it between steps of anything long. */
export function throwIfAborted(signal: AbortSignal | undefined, what: string): void {
  if (signal?.aborted)
    throw new PyraflowError('ERR_ABORTED', { what: `${what} was aborted`, cause: signal.reason })
}
