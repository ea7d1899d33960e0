import { DTYPES, type DType, engine, type Operand } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { track } from './scope.ts'

/** Native memory shared by a tensor and its views; freed when the last of them is disposed. */
class Storage {
  readonly id: number
  #owners = 1

  constructor(id: number) {
    this.id = id
  }

  retain(): this {
    this.#owners++
    return this
  }

  release(): void {
    if (--this.#owners === 0) engine.free(this.id)
  }
}

// The net under forgotten tensors; scopes and dispose() are the mechanism.
const forgotten = new FinalizationRegistry<Storage>((storage) => storage.release())

export type HostArray = Float32Array | Int32Array | Uint8Array

/**
 * A contiguous row-major array in native memory. Making one or computing with one only queues work; `await read()`
 * waits for it.
 */
export class Tensor implements Operand {
  readonly shape: readonly number[]
  readonly dtype: DType
  /** Number of elements. */
  readonly size: number
  /** Where the values begin in the storage. */
  get byteOffset(): number {
    return this.#byteOffset
  }
  /** Whether backward() should compute a gradient for this tensor. Leaves only; results inherit it by the tape. */
  requiresGrad = false
  /** f32 gradient of a leaf; an optimizer may install its own buffer here, backward() adds to it. */
  grad: Tensor | null = null
  /** Packed form of a weight for `linear`, when inference made one. */
  packed: Tensor | null = null
  #storage: Storage | null
  #byteOffset: number

  private constructor(storage: Storage, byteOffset: number, shape: readonly number[], dtype: DType) {
    this.#storage = storage
    this.#byteOffset = byteOffset
    this.shape = shape
    this.dtype = dtype
    this.size = sizeOf(shape)
    forgotten.register(this, storage, this)
    track(this)
  }

  /** Uninitialised memory. */
  static empty(shape: readonly number[], dtype: DType = 'f32'): Tensor {
    checkShape(shape)
    const bytes = sizeOf(shape) * DTYPES[dtype].bytes
    return new Tensor(new Storage(engine.alloc(bytes)), 0, [...shape], dtype)
  }

  /** A tensor without memory: only `engine` and `Offload` can do something with it. */
  static absent(shape: readonly number[], dtype: DType = 'f32'): Tensor {
    checkShape(shape)
    return new Tensor(new Storage(engine.reserve()), 0, [...shape], dtype)
  }

  static full(shape: readonly number[], value: number, dtype: DType = 'f32'): Tensor {
    const t = Tensor.empty(shape, dtype)
    if (t.size > 0) engine.run('fill', [], [t], [value])
    return t
  }

  static zeros(shape: readonly number[], dtype: DType = 'f32'): Tensor {
    return Tensor.full(shape, 0, dtype)
  }

  /** Copies host numbers in. `dtype` defaults to the array's own; f32 data may be stored as bf16. */
  static from(data: HostArray | readonly number[], shape?: readonly number[], dtype?: DType): Tensor {
    const array = Array.isArray(data) ? Float32Array.from(data) : (data as HostArray)
    const own: DType = array instanceof Float32Array ? 'f32' : array instanceof Int32Array ? 'i32' : 'u8'
    const dims = shape ?? [array.length]
    if (sizeOf(dims) !== array.length) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'Tensor.from',
        expected: `${sizeOf(dims)} values for shape [${dims}]`,
        received: `${array.length}`,
      })
    }
    const t = Tensor.empty(dims, own)
    if (t.size > 0) engine.write(t.storage, 0, array)
    if (dtype === undefined || dtype === own) return t
    const converted = Tensor.empty(dims, dtype)
    if (t.size > 0) engine.run('cast', [t], [converted], [])
    t.dispose()
    return converted
  }

  /** A tensor over mapped file bytes; nothing is copied and it must not be written. */
  static mapped(file: number, byteOffset: number, shape: readonly number[], dtype: DType): Tensor {
    const bytes = sizeOf(shape) * DTYPES[dtype].bytes
    return new Tensor(new Storage(engine.map(file, byteOffset, bytes)), 0, [...shape], dtype)
  }

  get rank(): number {
    return this.shape.length
  }

  get bytes(): number {
    return this.size * DTYPES[this.dtype].bytes
  }

  get disposed(): boolean {
    return this.#storage === null
  }

  /** Storage id, for the engine. @throws ERR_OPTION after dispose. */
  get storage(): number {
    if (this.#storage === null) {
      throw new PyraflowError('ERR_OPTION', {
        what: `tensor [${this.shape}] was used after it was disposed`,
        remedy: 'Return it from its scope() or call keep() on it.',
      })
    }
    return this.#storage.id
  }

  /**
   * Another shape over the same memory, from element `offset` on. Not differentiable by itself: use ops/reshape.
   */
  view(shape: readonly number[], offset = 0): Tensor {
    checkShape(shape)
    if (offset < 0 || offset + sizeOf(shape) > this.size) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'view',
        expected: `at most ${this.size} elements of [${this.shape}]`,
        received: `[${shape}] at ${offset}`,
      })
    }
    void this.storage
    const storage = (this.#storage as Storage).retain()
    return new Tensor(storage, this.byteOffset + offset * DTYPES[this.dtype].bytes, [...shape], this.dtype)
  }

  /**
   * Moves this tensor into `target` from element `offset` on, values included: how an optimizer lays a model's
   * parameters out side by side while the model keeps its tensors.
   */
  rebase(target: Tensor, offset: number): void {
    if (target.dtype !== this.dtype || offset < 0 || offset + this.size > target.size) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'rebase',
        expected: `${this.size} ${this.dtype} elements at ${offset} of [${target.shape}] ${target.dtype}`,
      })
    }
    const place = target.view(this.shape, offset)
    if (this.size > 0) engine.run('cast', [this], [place], [])
    void target.storage
    const storage = (target.#storage as Storage).retain()
    place.dispose()
    forgotten.unregister(this)
    ;(this.#storage as Storage).release()
    this.#storage = storage
    this.#byteOffset = target.byteOffset + offset * DTYPES[this.dtype].bytes
    forgotten.register(this, storage, this)
  }

  /** Overwrites the values with host numbers of the same dtype and size. */
  write(data: HostArray): void {
    if (data.byteLength !== this.bytes) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'Tensor.write',
        expected: `${this.bytes} bytes`,
        received: `${data.byteLength}`,
      })
    }
    engine.write(this.storage, this.byteOffset, data)
  }

  /**
   * Waits for the values. bf16 and f16 are widened to Float32Array.
   * @throws the queue's first error since the last wait.
   */
  async read(): Promise<HostArray> {
    if (this.dtype === 'bf16' || this.dtype === 'f16' || this.dtype === 'f64') {
      const wide = Tensor.empty(this.shape, 'f32')
      if (this.size > 0) engine.run('cast', [this], [wide], [])
      try {
        return await wide.read()
      } finally {
        wide.dispose()
      }
    }
    const target =
      this.dtype === 'f32'
        ? new Float32Array(this.size)
        : this.dtype === 'i32'
          ? new Int32Array(this.size)
          : new Uint8Array(this.bytes)
    await engine.read(this.storage, this.byteOffset, target)
    return target
  }

  /** `read()` for float tensors. */
  async floats(): Promise<Float32Array> {
    return (await this.read()) as Float32Array
  }

  /** The value of a one-element tensor. */
  async item(): Promise<number> {
    if (this.size !== 1) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'item',
        expected: 'one element',
        received: `[${this.shape}]`,
      })
    }
    return (await this.read())[0] as number
  }

  /** Frees the memory (when no view holds it) after everything queued so far. Calling it twice is harmless. */
  dispose(): void {
    if (this.#storage === null) return
    forgotten.unregister(this)
    this.#storage.release()
    this.#storage = null
    this.packed?.dispose()
    this.packed = null
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

export function sizeOf(shape: readonly number[]): number {
  let n = 1
  for (let i = 0; i < shape.length; i++) n *= shape[i] as number
  return n
}

function checkShape(shape: readonly number[]): void {
  for (const d of shape) {
    if (!Number.isInteger(d) || d < 0) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'shape',
        expected: 'whole numbers of 0 or more',
        received: `[${shape}]`,
      })
    }
  }
}
