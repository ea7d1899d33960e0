import { closeSync, existsSync, fstatSync, openSync, readFileSync, readSync, statSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { findWeights } from './find-weights.ts'
import { float16ToFloat32 } from './half.ts'
import {
  checkHeader,
  damaged,
  isRecord,
  type SafetensorsDtype,
  type TensorEntry,
} from './safetensors-header.ts'

export { dtypeBytes, type SafetensorsDtype, type TensorEntry } from './safetensors-header.ts'
export { type TensorToWrite, writeSafetensors } from './write-safetensors.ts'

/** What {@link Safetensors.readArray} gives: the file's own elements, 16-bit floats and F8 as raw bits. */
export type RawArray =
  | Float32Array<ArrayBuffer>
  | Float64Array<ArrayBuffer>
  | BigInt64Array<ArrayBuffer>
  | BigUint64Array<ArrayBuffer>
  | Int32Array<ArrayBuffer>
  | Uint32Array<ArrayBuffer>
  | Int16Array<ArrayBuffer>
  | Uint16Array<ArrayBuffer>
  | Int8Array<ArrayBuffer>
  | Uint8Array<ArrayBuffer>

/** A checked header and access to the tensors behind it; holds no open file. */
export interface Safetensors {
  readonly path: string
  /** Bytes of the file (of all shards together for {@link openWeights}). */
  readonly size: number
  readonly metadata: Readonly<Record<string, string>>
  readonly entries: ReadonlyMap<string, TensorEntry>
  /** Reads one tensor in its own element type. */
  readArray(name: string): RawArray
  /** Reads one tensor of F32, F64, BF16 or F16 as float32 (F64 is rounded). */
  readFloats(name: string): Float32Array<ArrayBuffer>
}

const maxHeaderBytes = 100 * 1024 * 1024
const readSlice = 256 * 1024 * 1024

/**
 * Reads and checks the header of a safetensors file; tensor bytes are read only when asked for.
 *
 * The check is strict because these offsets are later handed to the memory mapper: every tensor must
 * lie inside the file, have exactly the bytes its shape needs, and together they must cover the data
 * without hole or overlap.
 *
 * @throws PyraflowError `ERR_IO` when the file cannot be read, `ERR_CHECKPOINT` when it is damaged.
 */
export function openSafetensors(path: string): Safetensors {
  const { header, size, dataStart } = readHeader(path)
  const { entries, metadata } = checkHeader(path, header, dataStart, size)
  return view(path, size, metadata, entries)
}

/**
 * Opens weights given as a safetensors file, a `*.safetensors.index.json`, or a model folder (searched
 * as {@link findWeights} does). Shards are merged into one set of entries, each knowing its file.
 *
 * @throws PyraflowError `ERR_CHECKPOINT` when an index names a missing shard or tensor.
 */
export function openWeights(fileOrFolder: string): Safetensors {
  const path = isFolder(fileOrFolder) ? findWeights(fileOrFolder).path : fileOrFolder
  if (!path.endsWith('.json')) return openSafetensors(path)

  const map = readIndex(path)
  const missing = [...new Set(map.values())].filter((shard) => !existsSync(join(dirname(path), shard)))
  if (missing.length > 0) {
    throw damaged(path, {
      what: 'shards',
      expected: `${missing.map((shard) => join(dirname(path), shard)).join(', ')} beside the index`,
      received: 'no such file',
      remedy: 'Complete the download of this folder.',
    })
  }
  const shards = new Map<string, Safetensors>()
  for (const shard of new Set(map.values())) shards.set(shard, openSafetensors(join(dirname(path), shard)))
  const entries = new Map<string, TensorEntry>()
  for (const [name, shard] of map) {
    const entry = shards.get(shard)?.entries.get(name)
    if (!entry) {
      throw damaged(path, {
        what: `tensor '${name}'`,
        expected: `to be in ${shard}, as the index says`,
        received: 'no such tensor there',
        remedy: 'Download the index and all shards of the same version again.',
      })
    }
    entries.set(name, entry)
  }
  let size = 0
  let metadata: Record<string, string> = {}
  for (const shard of shards.values()) {
    size += shard.size
    metadata = { ...metadata, ...shard.metadata }
  }
  return view(path, size, metadata, entries)
}

/** Widens bfloat16 bits to float32; exact. */
export function bfloat16ToFloat32(bits: Uint16Array): Float32Array<ArrayBuffer> {
  const words = new Uint32Array(bits.length)
  for (let i = 0; i < bits.length; i++) words[i] = bits[i] << 16
  return new Float32Array(words.buffer)
}

function view(
  path: string,
  size: number,
  metadata: Record<string, string>,
  entries: Map<string, TensorEntry>,
): Safetensors {
  const readArray = (name: string): RawArray => {
    const entry = entries.get(name)
    if (!entry) {
      throw damaged(path, {
        what: `tensor '${name}'`,
        expected: 'a tensor of that name',
        received: `${entries.size} others${nearest(name, entries)}`,
        remedy: 'Check that this is the checkpoint the model was made for.',
      })
    }
    return asArray(entry.dtype, readBytes(entry.file, entry.begin, entry.end - entry.begin))
  }
  const readFloats = (name: string): Float32Array<ArrayBuffer> => {
    const dtype = entries.get(name)?.dtype
    const raw = readArray(name)
    if (raw instanceof Float32Array) return raw
    if (raw instanceof Float64Array) return Float32Array.from(raw)
    if (raw instanceof Uint16Array && dtype === 'BF16') return bfloat16ToFloat32(raw)
    if (raw instanceof Uint16Array && dtype === 'F16') return float16ToFloat32(raw)
    throw damaged(path, {
      what: `tensor '${name}'`,
      expected: 'F32, F64, BF16 or F16',
      received: String(dtype),
      remedy: 'Read it with readArray, or convert the checkpoint.',
    })
  }
  return Object.freeze({ path, size, metadata: Object.freeze(metadata), entries, readArray, readFloats })
}

function nearest(name: string, entries: Map<string, TensorEntry>): string {
  const tail = name.split('.').slice(-3).join('.')
  for (const other of entries.keys()) if (other.endsWith(tail)) return `, among them '${other}'`
  const first = entries.keys().next().value
  return first === undefined ? '' : `, for example '${first}'`
}

function readHeader(path: string): { header: unknown; size: number; dataStart: number } {
  return withFile(path, (file) => {
    const size = fstatSync(file).size
    if (size < 8) {
      throw damaged(path, {
        what: 'file size',
        expected: 'at least 8 bytes',
        received: `${size}`,
        remedy: 'The download was cut off, or this is not a safetensors file; fetch it again.',
      })
    }
    const lead = new DataView(readFrom(file, path, 0, 8).buffer)
    const length = lead.getBigUint64(0, true)
    if (length > BigInt(maxHeaderBytes) || length > BigInt(size - 8)) {
      throw damaged(path, {
        what: 'header length',
        expected: `at most ${Math.min(maxHeaderBytes, size - 8)} bytes (${size}-byte file)`,
        received: `${length}`,
        remedy: 'The file is cut off or not a safetensors file; fetch it again.',
      })
    }
    const bytes = readFrom(file, path, 8, Number(length))
    try {
      const text = new TextDecoder('utf-8', { fatal: true }).decode(bytes)
      return { header: JSON.parse(text) as unknown, size, dataStart: 8 + Number(length) }
    } catch (cause) {
      throw damaged(path, {
        what: 'header',
        expected: 'JSON in UTF-8',
        received: cause instanceof Error ? cause.message : String(cause),
        remedy: 'The file is damaged or not a safetensors file; fetch it again.',
        cause,
      })
    }
  })
}

function readIndex(path: string): Map<string, string> {
  let parsed: unknown
  try {
    parsed = JSON.parse(readFileSync(path, 'utf8'))
  } catch (cause) {
    if (!(cause instanceof SyntaxError)) throw unreadable(path, cause)
    throw damaged(path, {
      what: 'index',
      expected: 'JSON',
      received: cause.message,
      remedy: 'Download the index again.',
      cause,
    })
  }
  const map = isRecord(parsed) ? parsed.weight_map : undefined
  if (!isRecord(map)) {
    throw damaged(path, {
      what: 'index',
      expected: "an object 'weight_map' from tensor names to shard files",
      received: JSON.stringify(map) ?? 'no weight_map',
      remedy: 'Download the index again.',
    })
  }
  return new Map(
    Object.entries(map).map(([name, shard]) => {
      // A shard lies next to its index; anything else would let an index read files elsewhere.
      if (typeof shard === 'string' && shard !== '' && shard === basename(shard) && !shard.includes('\\')) {
        return [name, shard]
      }
      throw damaged(path, {
        what: `shard of tensor '${name}'`,
        expected: 'a file name without folders',
        received: JSON.stringify(shard) ?? 'nothing',
        remedy: 'Do not use this index; download it from its publisher again.',
      })
    }),
  )
}

function asArray(dtype: SafetensorsDtype, bytes: Uint8Array<ArrayBuffer>): RawArray {
  const buffer = bytes.buffer
  switch (dtype) {
    case 'F32':
      return new Float32Array(buffer)
    case 'F64':
      return new Float64Array(buffer)
    case 'I64':
      return new BigInt64Array(buffer)
    case 'U64':
      return new BigUint64Array(buffer)
    case 'I32':
      return new Int32Array(buffer)
    case 'U32':
      return new Uint32Array(buffer)
    case 'I16':
      return new Int16Array(buffer)
    case 'U16':
    case 'F16':
    case 'BF16':
      return new Uint16Array(buffer)
    case 'I8':
      return new Int8Array(buffer)
    default:
      return bytes
  }
}

function readBytes(path: string, begin: number, length: number): Uint8Array<ArrayBuffer> {
  return withFile(path, (file) => readFrom(file, path, begin, length))
}

function readFrom(file: number, path: string, begin: number, length: number): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(length)
  let done = 0
  while (done < length) {
    const got = readSync(file, bytes, done, Math.min(readSlice, length - done), begin + done)
    if (got === 0) {
      throw damaged(path, {
        what: `bytes ${begin} to ${begin + length}`,
        expected: `${length} bytes`,
        received: `${done} bytes`,
        remedy: 'The file became shorter while it was read; do not write to it meanwhile.',
      })
    }
    done += got
  }
  return bytes
}

function withFile<T>(path: string, use: (file: number) => T): T {
  let file: number | undefined
  try {
    file = openSync(path, 'r')
    return use(file)
  } catch (error) {
    throw error instanceof PyraflowError ? error : unreadable(path, error)
  } finally {
    if (file !== undefined) closeSync(file)
  }
}

function isFolder(path: string): boolean {
  try {
    return statSync(path).isDirectory()
  } catch {
    return false
  }
}

function unreadable(path: string, cause: unknown): PyraflowError {
  return new PyraflowError('ERR_IO', {
    what: `reading ${path}`,
    expected: 'a readable file',
    received: cause instanceof Error ? cause.message : String(cause),
    remedy: 'Check the path and its permissions.',
    cause,
  })
}
