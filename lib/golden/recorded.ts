import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { openSafetensors, type Safetensors } from '../io/safetensors.ts'
import { Tensor } from '../tensor/tensor.ts'

/** The tensors of one recorded case, over all its safetensors files. */
export class Recorded {
  readonly dir: string
  #files = new Map<string, Safetensors>()
  #names = new Map<string, string>()

  /** `json.tensors` says which file holds which tensor; a name in several files means the first one. */
  constructor(dir: string, json: { tensors?: { file: string; name: string }[] }) {
    this.dir = dir
    for (const { file, name } of json.tensors ?? []) if (!this.#names.has(name)) this.#names.set(name, file)
  }

  /** Folder of another case or model, named relative to the golden folder. */
  sibling(name: string): string {
    return siblingFolder(this.dir, name)
  }

  get names(): string[] {
    return [...this.#names.keys()]
  }

  has(name: string): boolean {
    return this.#names.has(name)
  }

  /** The file itself, or undefined when the case has none of that name. */
  file(name: string): Safetensors | undefined {
    let file = this.#files.get(name)
    if (!file && existsSync(join(this.dir, name))) {
      file = openSafetensors(join(this.dir, name))
      this.#files.set(name, file)
    }
    return file
  }

  #of(name: string): Safetensors {
    const file = this.file(this.#names.get(name) ?? 'tensors.safetensors')
    if (file) return file
    throw new PyraflowError('ERR_IO', {
      what: `golden case ${this.dir}`,
      expected: `a file with tensor '${name}'`,
      received: 'none',
      remedy: 'Fetch the whole folder again.',
    })
  }

  shape(name: string): readonly number[] {
    return this.#of(name).entries.get(name)?.shape ?? []
  }

  floats(name: string): Float32Array {
    return this.#of(name).readFloats(name)
  }

  doubles(name: string): Float64Array {
    return Float64Array.from(this.#of(name).readArray(name) as Float64Array)
  }

  /** I64, BOOL or U8 as numbers. */
  integers(name: string): number[] {
    return Array.from(this.#of(name).readArray(name) as Iterable<number | bigint>, Number)
  }

  bytes(name: string): Uint8Array {
    return this.#of(name).readArray(name) as Uint8Array
  }

  /** The tensor in native memory; floats may be converted to bf16. */
  tensor(name: string, dtype: 'f32' | 'bf16' = 'f32'): Tensor {
    return Tensor.from(this.floats(name), this.shape(name), dtype)
  }
}

/** Folder beside the case `dir`: models and inputs of other cases are named relative to the golden folder. */
export function siblingFolder(dir: string, name: string): string {
  return join(dirname(dir), name.trim())
}

/** The parsed case.json of a folder. @throws ERR_IO when it is missing or not JSON. */
// biome-ignore lint/suspicious/noExplicitAny: every kind of case has a JSON layout of its own
export function readCase(dir: string): any {
  const path = join(dir, 'case.json')
  try {
    return JSON.parse(readFileSync(path, 'utf8'))
  } catch (cause) {
    throw new PyraflowError('ERR_IO', {
      what: path,
      expected: 'the JSON of a recorded case',
      received: cause instanceof Error ? cause.message : String(cause),
      remedy: 'Fetch the whole golden folder again.',
      cause,
    })
  }
}
