import { type DType, engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import type { Safetensors, SafetensorsDtype, TensorEntry } from '../io/safetensors.ts'
import { openWeights } from '../io/safetensors.ts'
import { clamp } from '../ops/pointwise.ts'
import type { Generator } from '../tensor/generator.ts'
import { keep, scope } from '../tensor/scope.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'

/** Types that weights may be computed in. */
export type ComputeType = 'f32' | 'bf16'

/** How a parameter begins when training starts from scratch. `truncNormal` cuts at ±2 (absolute), `uniform` lies within ±its bound. */
export type Init =
  | 'xavier'
  | 'zeros'
  | 'ones'
  | { normal: number }
  | { truncNormal: number }
  | { uniform: number }

/** What the parameters are made for. */
export interface WeightsOptions {
  /** Type to compute in; weights of another type are converted. Default `f32`. */
  dtype?: ComputeType
  /** Parameters want gradients and may be written; without it they may lie in the mapped file. */
  train?: boolean
  /** Whether linear layers also keep a copy packed for the matrix kernels. Default: unless training. */
  pack?: boolean
  /** Prefix in training checkpoints, e.g. `dit.`: if any key has it, only those are meant, without it. */
  stripPrefix?: string
}

/** Settings of one tensor. */
export interface GetOptions {
  /** Another type than that of the model, e.g. for a table that stays f32. */
  dtype?: ComputeType
  /** A buffer is saved with the parameters but never trained. */
  buffer?: boolean
  /** What a tensor that can be computed holds, for files that lack it and when initialising. */
  values?: () => Float32Array
}

const FILE_TYPES: Partial<Record<SafetensorsDtype, DType>> = {
  F32: 'f32',
  BF16: 'bf16',
  F16: 'f16',
  F64: 'f64',
}

// Everything that the views made by sub() share.
interface Shared {
  readonly label: string
  readonly entries: ReadonlyMap<string, TensorEntry> | null
  readonly generator: Generator | null
  readonly dtype: ComputeType
  readonly train: boolean
  readonly pack: boolean
  readonly files: Map<string, number>
  readonly parameters: Map<string, Tensor>
  readonly buffers: Map<string, Tensor>
}

/**
 * The parameters of a model under the names of its published checkpoint: each is either loaded (mapped, when the
 * file holds the type that is computed in) or initialised, so a model is written once for both.
 */
export class Weights {
  readonly #shared: Shared
  readonly #prefix: string

  private constructor(shared: Shared, prefix: string) {
    this.#shared = shared
    this.#prefix = prefix
  }

  /**
   * Parameters from opened weights, or from a safetensors file, an index of shards, or a model folder.
   *
   * @throws ERR_IO or ERR_CHECKPOINT as `openWeights` does.
   */
  static open(source: string | Safetensors, options: WeightsOptions = {}): Weights {
    const { path, entries } = typeof source === 'string' ? openWeights(source) : source
    return Weights.#from(path, stripPrefix(entries, options.stripPrefix), null, options)
  }

  /** Parameters that are initialised; each draws from a stream named by its key, so their order is free. */
  static init(generator: Generator, options: WeightsOptions = {}): Weights {
    return Weights.#from('initialisation', null, generator, options)
  }

  static #from(
    label: string,
    entries: ReadonlyMap<string, TensorEntry> | null,
    generator: Generator | null,
    options: WeightsOptions,
  ): Weights {
    const { dtype = 'f32', train = false, pack = !train } = options
    if (dtype !== 'f32' && dtype !== 'bf16') {
      throw new PyraflowError('ERR_OPTION', {
        what: 'dtype',
        expected: 'f32 or bf16',
        received: String(dtype),
      })
    }
    const empty = { files: new Map(), parameters: new Map(), buffers: new Map() }
    return new Weights({ label, entries, generator, dtype, train, pack, ...empty }, '')
  }

  /**
   * A network that `make` asks the weights of a folder for; it must use all of them.
   *
   * @throws as `open` and `make` do; ERR_CHECKPOINT for keys that nothing asked for, except those with one of the ignored
   * prefixes, and for values that are not finite. The weights are freed then.
   */
  static async load<T>(
    dir: string,
    options: WeightsOptions & { ignorePrefixes: readonly string[] },
    make: (weights: Weights) => T,
  ): Promise<T> {
    const { ignorePrefixes, ...rest } = options
    const weights = Weights.open(dir, rest)
    try {
      const network = make(weights)
      weights.assertAllUsed({ ignorePrefixes })
      await weights.checkFinite()
      return network
    } catch (error) {
      weights.dispose()
      throw error
    }
  }

  /** Every parameter that was asked for so far, by its full published key. */
  get parameters(): Map<string, Tensor> {
    return this.#shared.parameters
  }

  /** The same of buffers. */
  get buffers(): Map<string, Tensor> {
    return this.#shared.buffers
  }

  get dtype(): ComputeType {
    return this.#shared.dtype
  }

  get train(): boolean {
    return this.#shared.train
  }

  get pack(): boolean {
    return this.#shared.pack
  }

  /** The same weights seen from below `name`. */
  sub(name: string | number): Weights {
    return new Weights(this.#shared, `${this.#prefix}${name}.`)
  }

  /** Whether the file holds this key; true when initialising. */
  has(name: string): boolean {
    return this.#shared.entries === null || this.#shared.entries.has(this.#prefix + name)
  }

  /**
   * The parameter `name` of this shape; the same tensor when asked again. The model owns it: no scope frees it.
   * `init` defaults to Xavier for matrices and kernels and zeros for vectors.
   *
   * @throws ERR_CHECKPOINT when the file lacks the key or holds another shape or element type.
   */
  get(name: string, shape: readonly number[], init?: Init, options: GetOptions = {}): Tensor {
    const key = this.#prefix + name
    const { entries, train } = this.#shared
    const own = options.buffer ? this.#shared.buffers : this.#shared.parameters
    const known = own.get(key)
    if (known) return known
    const dtype = options.dtype ?? this.#shared.dtype
    const values = entries?.has(key) ? undefined : options.values
    const make = (): Tensor => {
      if (values) return Tensor.from(values(), shape, dtype)
      return entries ? this.#load(key, shape, dtype) : this.#draw(key, shape, dtype, init)
    }
    const tensor = keep(make())
    tensor.requiresGrad = train && !options.buffer
    own.set(key, tensor)
    return tensor
  }

  #load(key: string, shape: readonly number[], dtype: ComputeType): Tensor {
    const { entries, label, files } = this.#shared
    const entry = entries?.get(key)
    if (!entry) {
      const near = nearestName(key, (entries as ReadonlyMap<string, TensorEntry>).keys())
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `${label}: missing '${key}'`,
        expected: `a tensor [${shape.join(', ')}]`,
        received: near === undefined ? 'no tensors at all' : `nothing of that name; nearest is '${near}'`,
        remedy: 'Check that the weights belong to this config.json and are complete.',
      })
    }
    if (entry.shape.length !== shape.length || entry.shape.some((d, i) => d !== shape[i])) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `${label}: '${key}'`,
        expected: `[${shape.join(', ')}]`,
        received: `[${entry.shape.join(', ')}]`,
        remedy: 'Check that the weights belong to this config.json.',
      })
    }
    const type = FILE_TYPES[entry.dtype]
    if (!type) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `${label}: '${key}'`,
        expected: 'element type F32, BF16, F16 or F64',
        received: entry.dtype,
        remedy: 'Convert the checkpoint to one of these.',
      })
    }
    let file = files.get(entry.file)
    if (file === undefined) {
      file = engine.openFile(entry.file).id
      files.set(entry.file, file)
    }
    // An optimizer writes parameters in place, which a mapping does not allow.
    if (type === dtype && !this.#shared.train) return Tensor.mapped(file, entry.begin, shape, dtype)
    const tensor = Tensor.empty(shape, dtype)
    if (tensor.size > 0) engine.load(tensor, file, entry.begin, type)
    return tensor
  }

  #draw(key: string, shape: readonly number[], dtype: ComputeType, init: Init | undefined): Tensor {
    const kind = init ?? (shape.length > 1 ? 'xavier' : 'zeros')
    if (kind === 'zeros' || kind === 'ones') return Tensor.full(shape, kind === 'ones' ? 1 : 0, dtype)
    const generator = (this.#shared.generator as Generator).stream(key)
    if (kind === 'xavier') {
      const area = sizeOf(shape.slice(2))
      const high = Math.sqrt(6 / (((shape[0] ?? 1) + (shape[1] ?? 1)) * area))
      return generator.uniform(shape, { low: -high, high, dtype })
    }
    if ('uniform' in kind) return generator.uniform(shape, { low: -kind.uniform, high: kind.uniform, dtype })
    if ('normal' in kind) return generator.normal(shape, { mean: 0, std: kind.normal, dtype })
    const std = kind.truncNormal
    // At the usual std of 0.02 the cut lies at 100 σ, where clamping and redrawing agree.
    return scope(() => clamp(generator.normal(shape, { mean: 0, std, dtype }), -2, 2))
  }

  /**
   * Closes the files (mapped tensors stay usable).
   *
   * @throws ERR_CHECKPOINT when the file has keys that the model did not ask for, except under `ignorePrefixes`.
   */
  assertAllUsed(options: { ignorePrefixes?: readonly string[] } = {}): void {
    this.close()
    const { entries, label } = this.#shared
    if (!entries) return
    const known = new Set(this.#all().map(([key]) => key))
    const ignored = options.ignorePrefixes ?? []
    const extra = [...entries.keys()].filter(
      (key) => !known.has(key) && !ignored.some((prefix) => key.startsWith(prefix)),
    )
    if (extra.length === 0) return
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: `${label}: keys of another model`,
      expected: `only the ${known.size} keys of this one`,
      received: `${extra.length} more: ${extra.slice(0, 4).join(', ')}${extra.length > 4 ? ', …' : ''}`,
      remedy: 'Check that the weights belong to this config.json.',
    })
  }

  /** Closes the files without looking for unused keys. */
  close(): void {
    for (const id of this.#shared.files.values()) engine.closeFile(id)
    this.#shared.files.clear()
  }

  /**
   * Waits until everything is loaded and looks at every value.
   *
   * @throws ERR_CHECKPOINT naming the parameters that hold NaN or infinity.
   */
  async checkFinite(): Promise<void> {
    const entries = this.#all()
    const sums = Tensor.empty([entries.length], 'f32')
    // A sum is finite only if all its terms are; one number a tensor keeps this to a single wait.
    entries.forEach(([, tensor], i) => {
      const sum = sums.view([1], i)
      engine.run('sum', [tensor], [sum], [1, tensor.size, 1, 1, 0])
      sum.dispose()
    })
    const values = await sums.floats()
    sums.dispose()
    const bad = entries.filter((_, i) => !Number.isFinite(values[i])).map(([key]) => key)
    if (bad.length === 0) return
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: `${this.#shared.label}: '${bad[0]}'${bad.length > 1 ? ` and ${bad.length - 1} more` : ''}`,
      expected: 'finite values',
      received: 'NaN or infinity',
      remedy: 'The file is damaged or comes from a training run that diverged.',
    })
  }

  #all(): [string, Tensor][] {
    return [...this.#shared.buffers, ...this.#shared.parameters]
  }

  /** Frees every parameter and buffer. */
  dispose(): void {
    this.close()
    for (const [, tensor] of this.#all()) tensor.dispose()
    this.#shared.parameters.clear()
    this.#shared.buffers.clear()
  }
}

function stripPrefix(
  entries: ReadonlyMap<string, TensorEntry>,
  prefix: string | undefined,
): ReadonlyMap<string, TensorEntry> {
  if (prefix === undefined || ![...entries.keys()].some((key) => key.startsWith(prefix))) return entries
  // Training checkpoints keep several models side by side; only the one named by the prefix is meant.
  return new Map(
    [...entries]
      .filter(([key]) => key.startsWith(prefix))
      .map(([key, entry]) => [key.slice(prefix.length), entry] as const),
  )
}

/** The candidate with the smallest edit distance to `name`. */
export function nearestName(name: string, candidates: Iterable<string>): string | undefined {
  let best: string | undefined
  let least = Number.POSITIVE_INFINITY
  for (const candidate of candidates) {
    const distance = editDistance(name, candidate)
    if (distance >= least) continue
    best = candidate
    least = distance
  }
  return best
}

function editDistance(a: string, b: string): number {
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      const replace = previous[j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1)
      row.push(Math.min(replace, previous[j] + 1, row[j - 1] + 1))
    }
    previous = row
  }
  return previous[b.length]
}
