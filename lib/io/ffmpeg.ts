import { type ChildProcessByStdio, spawn } from 'node:child_process'
import type { Readable, Writable } from 'node:stream'
import { PyraflowError } from '../engine/errors.ts'

/** Environment variable that replaces the `ffmpeg` found on PATH; `ffprobe` is then expected beside it. */
export const ffmpegVariable = 'PYRAFLOW_FFMPEG'

const keptStderr = 16_384

export interface ChildResult {
  code: number | null
  stderr: string
}

export interface ChildOptions {
  signal?: AbortSignal | undefined
  /** Called for every piece of stdout, in order. */
  onData?: (chunk: Uint8Array) => void
  /** Pieces for stdin; the next one is asked for only when the pipe has room. */
  input?: Iterable<Uint8Array> | AsyncIterable<Uint8Array> | undefined
}

export function ffmpegCommand(): string {
  return process.env[ffmpegVariable] || 'ffmpeg'
}

export function ffprobeCommand(): string {
  return ffmpegCommand().replace(/ffmpeg(?=(\.exe)?$)/i, 'ffprobe')
}

export function abortedError(what: string, cause?: unknown): PyraflowError {
  return new PyraflowError('ERR_ABORTED', {
    what,
    expected: 'to run to its end',
    received: 'an abort from the caller',
    remedy: 'nothing was left behind: call again to start over',
    cause,
  })
}

function missingError(command: string, cause: unknown): PyraflowError {
  return new PyraflowError('ERR_IO', {
    what: `starting ${command}`,
    expected: `the ${command} program on PATH`,
    received: (cause as NodeJS.ErrnoException).code ?? String(cause),
    remedy: `install ffmpeg (Debian: apt-get install ffmpeg), set ${ffmpegVariable}, or save as .webp`,
    cause,
  })
}

/**
 * Runs one child over pipes without ever blocking the event loop, and resolves when it has exited and all
 * its output was delivered. A non-zero exit is not an error here: only the caller can name the culprit.
 *
 * @throws PyraflowError `ERR_IO` if the program cannot be started, `ERR_ABORTED` after `signal`
 */
export async function runChild(
  command: string,
  args: string[],
  options: ChildOptions = {},
): Promise<ChildResult> {
  const { signal, onData, input } = options
  if (signal?.aborted) throw abortedError(command, signal.reason)
  const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'pipe'], windowsHide: true })
  const kill = (): void => void child.kill('SIGKILL')
  signal?.addEventListener('abort', kill, { once: true })
  let stderr = ''
  let failure: unknown
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    stderr = (stderr + text).slice(-keptStderr)
  })
  child.stdout.on('data', (chunk: Uint8Array) => {
    if (failure !== undefined) return
    try {
      onData?.(chunk)
    } catch (error) {
      failure = error
      kill()
    }
  })
  const exited = new Promise<number | null>((resolve, reject) => {
    child.once('error', (error) => reject(missingError(command, error)))
    child.once('close', resolve)
  })
  // A child that dies early closes its stdin; its exit code and stderr say more than the broken pipe does.
  child.stdin.on('error', () => {})
  const fed = feed(child, input, exited).catch((error: unknown) => {
    failure ??= error
    kill()
  })
  try {
    const code = await exited
    if (signal?.aborted) throw abortedError(command, signal.reason)
    await fed
    if (failure !== undefined) throw failure
    return { code, stderr: stderr.trim() }
  } finally {
    signal?.removeEventListener('abort', kill)
  }
}

async function feed(
  child: ChildProcessByStdio<Writable, Readable, Readable>,
  input: ChildOptions['input'],
  exited: Promise<unknown>,
): Promise<void> {
  const { stdin } = child
  let gone = false
  const closed = exited.then(
    () => (gone = true),
    () => (gone = true),
  )
  if (input) {
    for await (const chunk of input) {
      if (gone || stdin.destroyed) break
      if (!stdin.write(chunk)) {
        await Promise.race([new Promise((resolve) => stdin.once('drain', resolve)), closed])
      }
    }
  }
  stdin.end()
}
