import { PyraflowError } from '../engine/errors.ts'
import { type WriteOptions, withTempName, writeFully } from './atomic-stream.ts'
import { dtypeBytes, type SafetensorsDtype } from './safetensors-header.ts'

/** One tensor to write. 16-bit floats are given as raw bits in a Uint16Array. */
export interface TensorToWrite {
  readonly name: string
  readonly dtype: SafetensorsDtype
  readonly shape: readonly number[]
  /** The elements, or a function called when their turn comes, so that they need not all be in memory. */
  readonly data: ArrayBufferView | (() => ArrayBufferView | Promise<ArrayBufferView>)
}

/**
 * Writes a safetensors file atomically: a temporary file in the same folder is filled, synced and
 * renamed over `path`; on any failure it is removed and an existing file stays as it was.
 * Tensors are laid out by falling element size, so each lies aligned for a memory mapping.
 *
 * @throws PyraflowError `ERR_IO` (disk full, no permission), `ERR_ABORTED`, or `ERR_CHECKPOINT` for
 * repeated names and data that does not fit its shape; the latter before anything is written where it
 * can be known.
 */
export async function writeSafetensors(
  path: string,
  tensors: readonly TensorToWrite[],
  metadata?: Readonly<Record<string, string>>,
  options: WriteOptions = {},
): Promise<void> {
  const ordered = [...tensors].sort((a, b) => dtypeBytes[b.dtype] - dtypeBytes[a.dtype])
  const header = makeHeader(path, ordered, metadata)
  await withTempName(
    path,
    async (file) => {
      await writeFully(file, header, path, options)
      for (const tensor of ordered) {
        const data = typeof tensor.data === 'function' ? await tensor.data() : tensor.data
        checkData(path, tensor, data)
        await writeFully(file, data, path, options)
      }
    },
    options,
  )
}

function makeHeader(
  path: string,
  tensors: readonly TensorToWrite[],
  metadata: Readonly<Record<string, string>> | undefined,
): Uint8Array {
  // A Map and Object.fromEntries keep a tensor called '__proto__' an ordinary key.
  const header = new Map<string, unknown>()
  if (metadata && Object.keys(metadata).length > 0) header.set('__metadata__', metadata)
  let offset = 0
  for (const tensor of tensors) {
    if (header.has(tensor.name) || tensor.name === '__metadata__') {
      throw unwritable(path, tensor.name, 'a name used once', 'a repeated or reserved name')
    }
    if (typeof tensor.data !== 'function') checkData(path, tensor, tensor.data)
    const end = offset + byteCount(path, tensor)
    header.set(tensor.name, { dtype: tensor.dtype, shape: tensor.shape, data_offsets: [offset, end] })
    offset = end
  }
  const json = Buffer.from(JSON.stringify(Object.fromEntries(header)), 'utf8')
  const length = Math.ceil(json.length / 8) * 8
  const bytes = new Uint8Array(8 + length).fill(0x20)
  new DataView(bytes.buffer).setBigUint64(0, BigInt(length), true)
  bytes.set(json, 8)
  return bytes
}

function byteCount(path: string, tensor: TensorToWrite): number {
  const size = dtypeBytes[tensor.dtype]
  if (size === undefined || !tensor.shape.every((d) => Number.isSafeInteger(d) && d >= 0)) {
    throw unwritable(
      path,
      tensor.name,
      'a known dtype and a shape of integers',
      `${tensor.dtype} [${tensor.shape}]`,
    )
  }
  return tensor.shape.reduce((n, d) => n * d, size)
}

function checkData(path: string, tensor: TensorToWrite, data: ArrayBufferView): void {
  const bytes = byteCount(path, tensor)
  const element = (data as Partial<Uint8Array>).BYTES_PER_ELEMENT ?? 1
  // Plain bytes are taken for any dtype; other arrays must have elements of the right size.
  if (data.byteLength === bytes && (element === 1 || element === dtypeBytes[tensor.dtype])) return
  throw unwritable(
    path,
    tensor.name,
    `${bytes} bytes for ${tensor.dtype} [${tensor.shape.join(', ')}]`,
    `${data.byteLength} bytes in ${data.constructor.name}`,
  )
}

function unwritable(path: string, name: string, expected: string, received: string): PyraflowError {
  return new PyraflowError('ERR_CHECKPOINT', {
    what: `${path}: tensor '${name}' to write`,
    expected,
    received,
    remedy: 'Correct the list of tensors given to writeSafetensors; nothing was written.',
  })
}
