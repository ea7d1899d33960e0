import { type DType, engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import type { Safetensors } from '../io/safetensors.ts'
import { concat } from '../ops/copy.ts'
import { embedding } from '../ops/embedding.ts'
import { keep, scope } from '../tensor/scope.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'
import { readShard } from './shards.ts'

/** Where a row lies. */
export interface RowPlace {
  readonly shard: number
  readonly row: number
}

/** Shards in native memory, mapped: rows are gathered there, nothing passes through JavaScript. */
export class MappedShards {
  readonly #files: number[] = []
  readonly #shards: { file: Safetensors; tables: Map<string, Tensor> }[] = []
  readonly #places = new Map<string, RowPlace>()

  /** @throws ERR_CHECKPOINT naming a shard that is missing, damaged, or another one than `names` says */
  static open(paths: readonly string[], format: string, tables: readonly string[]): MappedShards {
    const mapped = new MappedShards()
    try {
      for (const path of paths) mapped.#add(path, format, tables)
      return mapped
    } catch (error) {
      mapped.dispose()
      throw error
    }
  }

  #add(path: string, format: string, names: readonly string[]): void {
    const shard = readShard(path, format)
    if (!shard || !names.every((name) => shard.file.entries.has(name))) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `shard ${path}`,
        expected: `a safetensors file of this cache with ${names.join(', ')}`,
        received: shard
          ? [...shard.file.entries.keys()].join(', ')
          : 'none, a damaged one or one of another kind',
        remedy: 'Encode the data set again: only what is missing is made.',
      })
    }
    const file = engine.openFile(path).id
    this.#files.push(file)
    const tables = new Map<string, Tensor>()
    this.#shards.push({ file: shard.file, tables })
    for (const name of names) {
      const { begin, dtype, shape } = this.entry(this.#shards.length - 1, name)
      const type: DType = dtype === 'BF16' ? 'bf16' : 'f32'
      const rows = shape[0] as number
      tables.set(name, keep(Tensor.mapped(file, begin, [rows, sizeOf(shape) / rows], type)))
    }
    for (const [row, key] of shard.keys.entries())
      this.#places.set(key, { shard: this.#shards.length - 1, row })
  }

  /** Where a row lies; undefined when there is none of that key. */
  place(key: string): RowPlace | undefined {
    return this.#places.get(key)
  }

  /** Type and shape of a table, [rows, …]. */
  entry(shard: number, name: string): { dtype: string; shape: readonly number[]; begin: number } {
    const { file } = this.#shards[shard] as { file: Safetensors }
    return file.entries.get(name) as { dtype: string; shape: readonly number[]; begin: number }
  }

  /** A whole table in JavaScript. */
  readArray(shard: number, name: string): ReturnType<Safetensors['readArray']> {
    return (this.#shards[shard] as { file: Safetensors }).file.readArray(name)
  }

  /** The rows at these places, in their order, as [places.length, row size] of the table's type. */
  gather(name: string, places: readonly RowPlace[]): Tensor {
    return scope(() => {
      const parts: Tensor[] = []
      for (let begin = 0, end = 0; begin < places.length; begin = end) {
        const { shard } = places[begin] as RowPlace
        while (end < places.length && (places[end] as RowPlace).shard === shard) end++
        const rows = Int32Array.from(places.slice(begin, end), ({ row }) => row)
        const table = this.#shards[shard]?.tables.get(name) as Tensor
        parts.push(embedding(table, Tensor.from(rows)))
      }
      return parts.length === 1 ? (parts[0] as Tensor) : concat(parts, 0)
    })
  }

  dispose(): void {
    for (const { tables } of this.#shards) for (const table of tables.values()) table.dispose()
    for (const file of this.#files) engine.closeFile(file)
    this.#files.length = 0
  }
}
