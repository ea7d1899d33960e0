import { PyraflowError } from '../engine/errors.ts'
import { readConfig } from '../io/pretrained.ts'
import { type ComputeType, Weights } from '../nn/weights.ts'
import { scope } from '../tensor/scope.ts'
import { atOnce } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'

/** How to load a text network. */
export interface TextNetworkOptions {
  /** Type of weights and activations; sums and statistics are f32 in both. Default `f32`. */
  readonly dtype?: ComputeType
  /** Ends the loading. */
  readonly signal?: AbortSignal | undefined
}

/** Is shown intermediate results while they live. */
export type Capture = (name: string, tensor: Tensor) => void

/** A config.json of the transformers library: fields are asked for by name and checked. */
export class TextConfig {
  readonly folder: string
  readonly #fields: Record<string, unknown>

  /** @throws ERR_IO, ERR_CHECKPOINT when the folder holds another kind of network than one of `architectures`. */
  constructor(folder: string, architectures: readonly string[]) {
    this.folder = folder
    this.#fields = readConfig(folder)
    const name = architectureOf(this.#fields)
    if (name === undefined || !architectures.includes(name)) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `text encoder ${folder}: config.json`,
        expected: architectures.join(' or '),
        received: name ?? 'no architecture',
        remedy:
          'Check that the folders of the text encoders belong to one model and have not changed places.',
      })
    }
  }

  /** A whole number from 1. @throws ERR_CHECKPOINT */
  size(field: string): number {
    const value = this.#fields[field]
    if (Number.isSafeInteger(value) && (value as number) > 0) return value as number
    throw this.wrong(field, 'a whole number from 1')
  }

  /** A positive number below 1. @throws ERR_CHECKPOINT */
  eps(field: string): number {
    const value = this.#fields[field]
    if (typeof value === 'number' && value > 0 && value < 1) return value
    throw this.wrong(field, 'a number from 0 to 1')
  }

  /** One of the values. @throws ERR_CHECKPOINT */
  oneOf<T extends string | number>(field: string, values: readonly T[]): T {
    const value = this.#fields[field] as T
    if (values.includes(value)) return value
    throw this.wrong(field, values.join(' or '))
  }

  wrong(field: string, expected: string): PyraflowError {
    return new PyraflowError('ERR_CHECKPOINT', {
      what: `text encoder ${this.folder}: config.json: ${field}`,
      expected,
      received: JSON.stringify(this.#fields[field]) ?? 'nothing',
    })
  }
}

/** What kind of network a config.json describes: the class in it, or the family. */
export function architectureOf(config: Record<string, unknown>): string | undefined {
  const { _class_name: own, architectures, model_type: family } = config
  const name = own ?? (Array.isArray(architectures) ? architectures[0] : undefined) ?? family
  return typeof name === 'string' ? name : undefined
}

/**
 * `Weights.load` for a text network. Nothing is packed: a text encoder runs once a prompt, and packed copies would double
 * the largest part of a model.
 */
export function loadNetwork<T>(
  folder: string,
  options: TextNetworkOptions,
  make: (weights: Weights) => T,
  ignorePrefixes: readonly string[],
): Promise<T> {
  const all = { ...options, pack: false, ignorePrefixes }
  return Weights.load(folder, all, (weights) => atOnce(() => make(weights)))
}

/** Runs a block whose input nobody needs afterwards. */
export function replaceBy(x: Tensor, block: (x: Tensor) => Tensor): Tensor {
  const y = scope(() => block(x))
  x.dispose()
  return y
}

/**
 * Rows of token ids, one after the other, as i32 [R·S].
 *
 * @throws ERR_SHAPE for rows that are not all `length` long, or none; ERR_OPTION for an id outside the vocabulary.
 */
export function tokenTensor(
  what: string,
  rows: readonly (readonly number[])[],
  length: number,
  vocabulary: number,
): Tensor {
  const other = rows.find((row) => row.length !== length)
  if (rows.length === 0 || length === 0 || other) {
    throw new PyraflowError('ERR_SHAPE', {
      what,
      expected: 'one row of tokens or more, all of one length',
      received: other ? `${other.length} beside ${length}` : 'none',
    })
  }
  const ids = rows.flat()
  const bad = ids.find((id) => !(Number.isInteger(id) && id >= 0 && id < vocabulary))
  if (bad !== undefined) {
    throw new PyraflowError('ERR_OPTION', {
      what: `${what}: token id`,
      expected: `a whole number from 0 to ${vocabulary - 1}`,
      received: `${bad}`,
      remedy: 'Check that tokenizer and text encoder belong to one model.',
    })
  }
  return Tensor.from(Int32Array.from(ids))
}
