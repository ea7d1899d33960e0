import { type FileHandle, open } from 'node:fs/promises'
import { PyraflowError } from '../engine/errors.ts'
import { writeAtomically } from './atomic.ts'

/** Options shared by everything that writes a large file. */
export interface WriteOptions {
  /** Aborting stops between chunks, removes the temporary file and leaves the target as it was. */
  readonly signal?: AbortSignal | undefined
}

// One write call never carries more than this, so that an abort is noticed in good time.
const sliceBytes = 16 * 1024 * 1024

/**
 * Runs `fill` on a temporary file next to `path`, which {@link writeAtomically} makes durable and renames over `path`.
 * A reader sees the old file or the complete new one, never a part; on any failure the temporary
 * file is removed and `path` is untouched.
 *
 * @throws PyraflowError `ERR_IO` when the folder or disk refuses, `ERR_ABORTED` on abort; errors that
 * `fill` itself raises as PyraflowError pass through unchanged.
 */
export async function withTempName(
  path: string,
  fill: (file: FileHandle) => Promise<void>,
  options: WriteOptions = {},
): Promise<void> {
  throwIfAborted(options.signal, path)
  await writeAtomically(path, async (temporary) => {
    const file = await open(temporary, 'wx')
    try {
      await fill(file)
      throwIfAborted(options.signal, path)
    } finally {
      await file.close()
    }
  })
}

/** Writes `chunks` in order to `path` as {@link withTempName} does. */
export async function writeFileAtomic(
  path: string,
  chunks: string | ArrayBufferView | Iterable<ArrayBufferView> | AsyncIterable<ArrayBufferView>,
  options: WriteOptions = {},
): Promise<void> {
  const list =
    typeof chunks === 'string'
      ? [Buffer.from(chunks, 'utf8')]
      : ArrayBuffer.isView(chunks)
        ? [chunks]
        : chunks
  await withTempName(
    path,
    async (file) => {
      for await (const chunk of list) await writeFully(file, chunk, path, options)
    },
    options,
  )
}

/** Appends every byte of `data` at the file's position; a short write is continued, not accepted. */
export async function writeFully(
  file: FileHandle,
  data: ArrayBufferView,
  path: string,
  options: WriteOptions = {},
): Promise<void> {
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
  let done = 0
  while (done < bytes.length) {
    throwIfAborted(options.signal, path)
    const { bytesWritten } = await file.write(bytes, done, Math.min(sliceBytes, bytes.length - done))
    done += bytesWritten
  }
}

function throwIfAborted(signal: AbortSignal | undefined, path: string): void {
  if (!signal?.aborted) return
  throw new PyraflowError('ERR_ABORTED', {
    what: `writing ${path}`,
    expected: 'no abort before the file was complete',
    received: 'an aborted signal',
    remedy: 'The target is unchanged: write again when wanted',
    cause: signal.reason,
  })
}
