import { createHash, type Hash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { open } from 'node:fs/promises'
import { throwIfAborted } from '../engine/errors.ts'
import { ioError } from './atomic.ts'

const SAMPLE = 65_536
const SAMPLES = 16
const SMALL = SAMPLE * SAMPLES

/**
 * Adds to a hash what tells a file from others without reading gigabytes: a name for it, its size, and its bytes: all of
 * a file up to 1 MiB, else 64 KiB at each of 16 evenly spread places, which takes in the headers of safetensors files. A
 * change that misses all of these places goes unnoticed. A file that is not there adds nothing.
 */
export async function addFile(hash: Hash, name: string, path: string): Promise<void> {
  const file = await open(path).catch(() => undefined)
  if (!file) return
  try {
    const info = await file.stat()
    if (!info.isFile()) return
    const { size } = info
    hash.update(`${name} ${size}\n`)
    const buffer = Buffer.alloc(Math.min(size, SAMPLE))
    const count = size <= SMALL ? Math.ceil(size / SAMPLE) : SAMPLES
    for (let i = 0; i < count; i++) {
      const at = size <= SMALL ? i * SAMPLE : Math.floor((i * (size - SAMPLE)) / (SAMPLES - 1))
      const { bytesRead } = await file.read(buffer, 0, buffer.length, at)
      hash.update(buffer.subarray(0, bytesRead))
    }
  } finally {
    await file.close()
  }
}

/**
 * The sha-256 of all bytes of a file, in hex.
 *
 * @throws ERR_IO naming it; ERR_ABORTED
 */
export async function hashFile(path: string, signal?: AbortSignal): Promise<string> {
  throwIfAborted(signal, `reading ${path}`)
  const hash = createHash('sha256')
  try {
    for await (const piece of createReadStream(path, { highWaterMark: 1 << 20 })) {
      hash.update(piece as Buffer)
      throwIfAborted(signal, `reading ${path}`)
    }
  } catch (error) {
    throw ioError(error, 'reading', path)
  }
  return hash.digest('hex')
}
