import { engine } from '../engine/engine.ts'
import type { TensorToWrite } from '../io/safetensors.ts'
import { Tensor } from '../tensor/tensor.ts'

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
  if (tensor.dtype === dtype) {
    await engine.read(tensor.storage, tensor.byteOffset, target)
    return target
  }
  const converted = Tensor.empty(tensor.shape, dtype)
  engine.run('cast', [tensor], [converted], [])
  try {
    await engine.read(converted.storage, converted.byteOffset, target)
  } finally {
    converted.dispose()
  }
  return target
}
