import { createHash, type Hash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { copyFile, mkdir, open, rename, rm, stat, symlink } from 'node:fs/promises'
import { dirname, relative } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { ioError, temporaryName } from './atomic.ts'

/** A file of a repository, as its listing names it. */
export interface HubFile {
  path: string
  size: number
  /** SHA-256 of a large file, else the Git object's SHA-1; the name of the blob in the cache. */
  digest: string
}

export interface FetchOptions {
  /** Sends a request, with the token where it belongs. */
  fetch: typeof fetch
  signal?: AbortSignal | undefined
  /** Attempts without a single new byte before giving up. */
  attempts: number
  /** Pause before the second attempt; it doubles from there. */
  pauseMs: number
  /** Bytes of this file that are there, and how many of them have just arrived. */
  onBytes(bytes: number, arrived: number): void
}

const LONGEST_PAUSE_MS = 30_000

/**
 * Brings a file into the cache as `blobs/<digest>`. Bytes arrive in `<digest>.incomplete`, which a later call continues,
 * and get their name when size and checksum are right.
 *
 * @throws ERR_IO for a server that keeps failing, a checksum that is wrong or a full disk; ERR_ABORTED. What has arrived
 *   stays for the next call, unless it is wrong.
 */
export async function fetchBlob(
  url: string,
  file: HubFile,
  blob: string,
  options: FetchOptions,
): Promise<void> {
  const partial = `${blob}.incomplete`
  let failures = 0
  let restarted = false
  for (;;) {
    const before = await sizeOf(partial)
    try {
      if (before !== file.size || before === 0) await append(url, file, partial, before, options)
      if ((await digestOf(partial, file, options.signal)) === file.digest) {
        await rename(partial, blob)
        return
      }
      await rm(partial, { force: true })
      // Bytes of an earlier call may be to blame: once more, from the start.
      if (before === 0 || restarted) throw mismatch(file)
      restarted = true
    } catch (error) {
      throwIfAborted(options.signal, 'download')
      if (!(error instanceof Transient)) throw ioError(error, 'writing', partial)
      failures = (await sizeOf(partial)) > before ? 1 : failures + 1
      await pauseAfter(error, failures, file.path, options)
    }
  }
}

/** Something that may be better in a moment. */
export class Transient extends Error {
  readonly retryAfterMs: number | undefined

  constructor(message: string, cause?: unknown, retryAfterMs?: number) {
    super(message, { cause })
    this.retryAfterMs = retryAfterMs
  }
}

/** Waits before the next attempt. @throws ERR_IO after the last one; ERR_ABORTED */
export async function pauseAfter(
  error: Transient,
  failures: number,
  what: string,
  { attempts, pauseMs, signal }: Pick<FetchOptions, 'attempts' | 'pauseMs' | 'signal'>,
): Promise<void> {
  if (failures >= attempts) {
    throw new PyraflowError('ERR_IO', {
      what: `download of ${what}`,
      received: `${error.message}, ${failures} times in a row`,
      remedy: 'Check connection, proxy and endpoint, and call again: it continues where it stopped.',
      cause: error.cause,
    })
  }
  const pause = error.retryAfterMs ?? pauseMs * 2 ** (failures - 1)
  await sleep(Math.min(pause, LONGEST_PAUSE_MS), undefined, signalOf(signal)).catch(() => undefined)
  throwIfAborted(signal, 'download')
}

function mismatch(file: HubFile): PyraflowError {
  return new PyraflowError('ERR_IO', {
    what: `checksum of ${file.path}`,
    expected: file.digest,
    received: 'other bytes',
    remedy: 'Call again; if it stays wrong, the server or a proxy on the way changes the file.',
  })
}

// Adds what is missing to the partial file.
async function append(
  url: string,
  file: HubFile,
  partial: string,
  have: number,
  { fetch, signal, onBytes }: FetchOptions,
): Promise<void> {
  // Longer than it may be: it belongs to something else.
  const from = have < file.size ? have : 0
  const headers: Record<string, string> = from > 0 ? { range: `bytes=${from}-` } : {}
  const response = await fetch(url, { headers, ...signalOf(signal) }).catch((error: unknown) => {
    throw new Transient(`no answer (${reasonOf(error)})`, error)
  })
  if (!response.ok || !response.body) throw await refusal(response, file)
  // A server that knows no ranges sends everything again.
  let at = response.status === 206 ? from : 0
  if (at > 0 && !response.headers.get('content-range')?.startsWith(`bytes ${at}-`)) {
    await response.body.cancel()
    throw new Transient(`another part of the file than from byte ${at}`)
  }
  const body = response.body[Symbol.asyncIterator]()
  const out = await open(partial, at > 0 ? 'r+' : 'w')
  try {
    for (;;) {
      const next = await body.next().catch((error: unknown) => {
        throw new Transient(`a connection that broke at byte ${at} (${reasonOf(error)})`, error)
      })
      if (next.done) break
      const bytes = next.value as Uint8Array
      if (at + bytes.length > file.size) throw new Transient(`more than ${file.size} bytes`)
      for (let done = 0; done < bytes.length; ) {
        const { bytesWritten } = await out.write(bytes, done, bytes.length - done, at)
        done += bytesWritten
        at += bytesWritten
      }
      onBytes(at, bytes.length)
    }
    await out.sync()
  } finally {
    await out.close()
    await body.return?.().catch(() => undefined)
  }
  if (at < file.size) throw new Transient(`a body that ended at byte ${at}`)
}

async function refusal(response: Response, file: HubFile): Promise<Error> {
  await response.body?.cancel().catch(() => undefined)
  const seconds = Number(response.headers.get('retry-after'))
  return refusalOf(response.status, file.path, seconds > 0 ? seconds * 1000 : undefined)
}

/** What a status that is not 2xx means: something to try again, or an ERR_IO. */
export function refusalOf(status: number, what: string, retryAfterMs?: number): Error {
  if (status === 408 || status === 429 || status >= 500) {
    return new Transient(`status ${status}`, undefined, retryAfterMs)
  }
  const denied = status === 401 || status === 403
  return new PyraflowError('ERR_IO', {
    what: `download of ${what}`,
    received: `status ${status}`,
    remedy: denied
      ? 'Accept the terms of the repository where it asks for that, and set HF_TOKEN to a token that may read it.'
      : status === 404
        ? 'Check the name of the repository and the revision; a private one also answers so without HF_TOKEN.'
        : 'Check the endpoint.',
  })
}

/** The first cause that says something: undici wraps it in "fetch failed". */
export function reasonOf(error: unknown): string {
  const { cause, message, code } = error as { cause?: unknown; message?: string; code?: string }
  return cause === undefined || cause === null ? (code ?? message ?? String(error)) : reasonOf(cause)
}

const signalOf = (signal: AbortSignal | undefined): { signal?: AbortSignal } => (signal ? { signal } : {})

async function sizeOf(path: string): Promise<number> {
  return (await stat(path).catch(() => undefined))?.size ?? 0
}

async function digestOf(path: string, file: HubFile, signal: AbortSignal | undefined): Promise<string> {
  const hash: Hash =
    file.digest.length === 64 ? createHash('sha256') : createHash('sha1').update(`blob ${file.size}\0`)
  for await (const bytes of createReadStream(path, { highWaterMark: 1 << 18, ...signalOf(signal) })) {
    hash.update(bytes as Uint8Array)
  }
  return hash.digest('hex')
}

/** Lets `pointer` stand for `blob`: a relative link, as the other users of the cache make them, or a copy. */
export async function linkBlob(blob: string, pointer: string): Promise<void> {
  const temporary = temporaryName(pointer)
  try {
    await mkdir(dirname(pointer), { recursive: true })
    await symlink(relative(dirname(pointer), blob), temporary).catch(() => copyFile(blob, temporary))
    await rename(temporary, pointer)
  } catch (error) {
    await rm(temporary, { force: true }).catch(() => undefined)
    throw ioError(error, 'writing', pointer)
  }
}
