import { randomBytes } from 'node:crypto'
import { lstat, mkdir, open, readdir, rename, rm, writeFile } from 'node:fs/promises'
import { basename, dirname, join, sep } from 'node:path'
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

/** Removes what writes of `path` have left behind whose process died. Nobody else may be writing it. */
export async function removeTemporaries(path: string): Promise<void> {
  const folder = dirname(path)
  for (const name of await readdir(folder).catch(() => [])) {
    if (!name.startsWith(`.${basename(path)}.`) || !name.endsWith('.tmp')) continue
    await rm(join(folder, name), { recursive: true, force: true })
  }
}

/** Makes what a folder lists durable. Not every platform can open a folder; the data is safe without it. */
export async function syncFolder(folder: string): Promise<void> {
  try {
    const handle = await open(folder, 'r')
    try {
      await handle.sync()
    } finally {
      await handle.close()
    }
  } catch {}
}

/** Waits until a file, or everything in a folder, is on the disk. */
async function flush(path: string): Promise<void> {
  if ((await lstat(path)).isDirectory()) {
    for (const name of await readdir(path)) await flush(join(path, name))
    return syncFolder(path)
  }
  const file = await open(path, 'r+')
  try {
    await file.sync()
  } finally {
    await file.close()
  }
}

// Temporary folders that are being filled. What is written into them is flushed with them, once.
const filling = new Set<string>()

/**
 * Runs `write(temporary)`, which makes a file or a folder of that name, waits until all of it is on the disk, and renames
 * it to `path`; on any failure it is removed and whatever was under `path` before is untouched. Missing parent folders are
 * created. The rename itself is durable when this resolves: after a power cut there is the old `path` or the new one.
 *
 * @throws PyraflowError `ERR_IO` naming `path` (full disk, not writable, …)
 */
export async function writeAtomically(
  path: string,
  write: (temporary: string) => Promise<void>,
): Promise<void> {
  const temporary = temporaryName(path)
  const inner = [...filling].some((folder) => path.startsWith(folder + sep))
  filling.add(temporary)
  try {
    await mkdir(dirname(path), { recursive: true })
    await write(temporary)
    if (!inner) await flush(temporary)
    await rename(temporary, path)
  } catch (error) {
    // The clean-up must not hide the first error: on a full or vanished disk it may fail as well.
    await rm(temporary, { recursive: true, force: true }).catch(() => {})
    throw ioError(error, 'writing', path)
  } finally {
    filling.delete(temporary)
  }
  if (!inner) await syncFolder(dirname(path))
}

/** `writeAtomically` for bytes that are already in memory. */
export async function writeFileAtomically(path: string, data: Uint8Array | string): Promise<void> {
  await writeAtomically(path, (temporary) => writeFile(temporary, data, { flag: 'wx' }))
}
