import { randomBytes } from 'node:crypto'
import { mkdir, open, rename, rm } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'

const remedies: Record<string, string> = {
  ENOSPC: 'free some disk space or choose another output folder',
  EDQUOT: 'free some disk quota or choose another output folder',
  EACCES: 'check the permissions of the folder or choose another one',
  EPERM: 'check the permissions of the folder or choose another one',
  EROFS: 'the file system is read-only: choose another output folder',
  ENOENT: 'check that the path exists and is spelt correctly',
  ENOTDIR: 'a part of the path is a file, not a folder: choose another path',
  EEXIST: 'a part of the path is a file, not a folder: choose another path',
  EISDIR: 'the path is a folder: give a file name',
}

/**
 * Turns any failure of the file system into an `ERR_IO` that names the file and what to do about it.
 * Errors that are already typed pass unchanged, so a caller may wrap a whole block.
 */
export function ioError(error: unknown, action: string, path: string): PyraflowError {
  if (error instanceof PyraflowError) return error
  const { code, message } = error as NodeJS.ErrnoException
  return new PyraflowError('ERR_IO', {
    what: `${action} ${path} failed`,
    received: code ?? message ?? String(error),
    remedy: remedies[code ?? ''] ?? 'check the file and the folder it lies in',
    cause: error,
  })
}

/** A hidden name beside `path`, so that the later rename never crosses file systems. */
export function temporaryName(path: string): string {
  return join(dirname(path), `.${basename(path)}.${process.pid}-${randomBytes(4).toString('hex')}.tmp`)
}

/**
 * Runs `write(temporary)` and renames the result to `path`; on any failure the temporary file or folder
 * is removed and whatever was under `path` before is untouched. Missing parent folders are created.
 *
 * @throws PyraflowError `ERR_IO` naming `path` (full disk, not writable, …)
 */
export async function writeAtomically(
  path: string,
  write: (temporary: string) => Promise<void>,
): Promise<void> {
  const temporary = temporaryName(path)
  try {
    await mkdir(dirname(path), { recursive: true })
    await write(temporary)
    await rename(temporary, path)
  } catch (error) {
    // The clean-up must not hide the first error: on a full or vanished disk it may fail as well.
    await rm(temporary, { recursive: true, force: true }).catch(() => {})
    throw ioError(error, 'writing', path)
  }
}

/** `writeAtomically` for bytes that are already in memory, flushed to the disk before the rename. */
export async function writeFileAtomically(path: string, data: Uint8Array | string): Promise<void> {
  await writeAtomically(path, async (temporary) => {
    const file = await open(temporary, 'wx')
    try {
      await file.writeFile(data)
      await file.sync()
    } finally {
      await file.close()
    }
  })
}
