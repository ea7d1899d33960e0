import { engine } from '../engine/engine.ts'
import type { TensorToWrite } from '../io/safetensors.ts'
import { Tensor } from '../tensor/tensor.ts'
import { whileThere } from './offload.ts'

/**
 * Describes tensors for a safetensors file in the given storage type. Each is read from the engine only when the
 * writer asks for it, so a checkpoint never needs a second copy of the model.
 */
export function tensorsToWrite(tensors: Iterable<[string, Tensor]>, dtype?: 'f32' | 'bf16'): TensorToWrite[] {
  return Array.from(tensors, ([name, tensor]) => {
    const type = dtype ?? (tensor.dtype === 'bf16' ? 'bf16' : 'f32')
    return {
      name,
      dtype: type === 'bf16' ? 'BF16' : 'F32',
      shape: [...tensor.shape],
      data: () => readAs(tensor, type),
    }
  })
}

/** The values of a tensor in a storage type; bf16 as raw bits. */
export async function readAs(
  tensor: Tensor,
  dtype: 'f32' | 'bf16',
): Promise<Float32Array<ArrayBuffer> | Uint16Array<ArrayBuffer>> {
  const target = dtype === 'bf16' ? new Uint16Array(tensor.size) : new Float32Array(tensor.size)
  // What is only queued here finds the values, wherever they are afterwards.
  const reading = async (): Promise<void> => {
    if (tensor.dtype === dtype) return engine.read(tensor.storage, tensor.byteOffset, target)
    const converted = Tensor.empty(tensor.shape, dtype)
    engine.run('cast', [tensor], [converted], [])
    const read = engine.read(converted.storage, converted.byteOffset, target)
    converted.dispose()
    return read
  }
  // Beside a packed form the values are those of the file.
  await (tensor.packed ? reading() : whileThere(tensor, reading))
  return target
}
