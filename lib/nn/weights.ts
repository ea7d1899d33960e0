import { statSync } from 'node:fs'
import { abortable } from '../engine/abortable.ts'
import { type DType, engine, type PackForm } from '../engine/engine.ts'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { nearestName } from '../io/nearest-name.ts'
import type { Safetensors, SafetensorsDtype, TensorEntry } from '../io/safetensors.ts'
import { openWeights } from '../io/safetensors.ts'
import { packedBytes, packInto, packWeight } from '../ops/matmul.ts'
import { clamp } from '../ops/pointwise.ts'
import type { Generator } from '../tensor/generator.ts'
import { keep, scope } from '../tensor/scope.ts'
import { sliced } from '../tensor/sliced.ts'
import type { Steps } from '../tensor/tape.ts'
import { sizeOf, Tensor } from '../tensor/tensor.ts'
import type { LowRank } from './linear.ts'
import { inTurn, release, share } from './loaded.ts'
import { Offload } from './offload.ts'

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
  /** Whether linear layers keep their weights packed for the matrix kernels. Default: unless training. */
  pack?: boolean
  /** Round the matrices of layers that many tokens pass (`forTokens`) to eight bits. Not for training. */
  quantize?: 'int8' | undefined
  /**
   * Let matrices out of memory and back (`Weights.offload`), which are then not shared with others who load the file;
   * `absent`: begin without them. Not for training.
   */
  offload?: 'possible' | 'absent' | undefined
  /** Only check names, shapes and types: every tensor is what the file holds, mapped, and none of it is read. */
  survey?: boolean
  /** Prefix in training checkpoints, e.g. `dit.`: if any key has it, only those are meant, without it. */
  stripPrefix?: string
}

/** Settings of one tensor. */
export interface GetOptions {
  /** Another type than that of the model, e.g. for a table that stays f32. */
  dtype?: ComputeType
  /** A buffer is saved with the parameters but never trained. */
  buffer?: boolean
  /** A matrix that only `linear` reads: packed, if these weights are. */
  matrix?: boolean
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
  readonly quantize: 'int8' | undefined
  readonly survey: boolean
  readonly offload: Offload | null
  readonly files: Map<string, { id: number; identity: string }>
  readonly parameters: Map<string, Tensor>
  readonly buffers: Map<string, Tensor>
  /** Keys of what is shared with others who load the same file. */
  readonly shares: string[]
  /** By the name of the layer, which is that of its weight without `.weight`. */
  readonly adapters: ReadonlyMap<string, LowRank>
  loading: Loading | null
}

/** A network's weights on their way from the file. */
interface Loading {
  /** What is left to queue, a tensor at a time. */
  readonly steps: (() => void)[]
  /** One sum a tensor of the file, which is finite only if all its values are. */
  readonly sums: Tensor
  readonly checked: string[]
}

/**
 * The parameters of a model under the names of its published checkpoint: each is either loaded (mapped, when the
 * file holds the type that is computed in) or initialised, so a model is written once for both.
 */
export class Weights {
  readonly #shared: Shared
  readonly #prefix: string
  readonly #forTokens: boolean

  private constructor(shared: Shared, prefix: string, forTokens = false) {
    this.#shared = shared
    this.#prefix = prefix
    this.#forTokens = forTokens
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
    const { dtype = 'f32', train = false, survey = false, pack = !train && !survey } = options
    if (dtype !== 'f32' && dtype !== 'bf16') {
      throw new PyraflowError('ERR_OPTION', {
        what: 'dtype',
        expected: 'f32 or bf16',
        received: String(dtype),
      })
    }
    const { quantize } = options
    if (quantize !== undefined && (quantize !== 'int8' || !pack)) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'quantize',
        expected: pack ? 'int8' : 'nothing in training, or where weights are not packed',
        received: String(quantize),
      })
    }
    const empty = { files: new Map(), parameters: new Map(), buffers: new Map(), shares: [], loading: null }
    const adapters = new Map<string, LowRank>()
    const offload = options.offload && !train ? new Offload(options.offload) : null
    const how = { dtype, train, pack, quantize, survey, offload }
    return new Weights({ label, entries, generator, adapters, ...how, ...empty }, '')
  }

  /**
   * A network that `make` asks the weights of a folder for; it must use all of them. What `make` gets is filled
   * afterwards, a tensor at a time; the event loop goes on meanwhile, and wherever `make` pauses.
   *
   * @throws as `open` and `make` do; ERR_CHECKPOINT for keys that nothing asked for, except those with one of the ignored
   * prefixes, and for values that are not finite; ERR_ABORTED. The weights are freed then.
   */
  static async load<T>(
    dir: string,
    options: WeightsOptions & { ignorePrefixes: readonly string[]; signal?: AbortSignal | undefined },
    make: (weights: Weights) => Steps<T>,
  ): Promise<T> {
    const { ignorePrefixes, signal, ...rest } = options
    return inTurn(async () => {
      throwIfAborted(signal, 'loading')
      const weights = Weights.open(dir, rest)
      const job = engine.newJob()
      try {
        engine.within(job, () => weights.#startLoading())
        const network = await sliced(() => make(weights), { grad: false, job })
        weights.assertAllUsed(ignorePrefixes)
        await sliced(() => weights.#fillSteps(signal), { grad: false, job })
        if (!weights.offload) weights.close()
        await abortable(weights.#checkSums(), signal, job, 'loading')
        return network
      } catch (error) {
        await engine.cancel(job)
        weights.dispose()
        throw error
      } finally {
        weights.#endLoading()
      }
    })
  }

  #startLoading(): void {
    const sums = keep(Tensor.empty([this.#shared.entries?.size ?? 0], 'f32'))
    this.#shared.loading = { steps: [], sums, checked: [] }
  }

  *#fillSteps(signal: AbortSignal | undefined): Steps<void> {
    for (const step of (this.#shared.loading as Loading).steps) {
      throwIfAborted(signal, 'loading')
      step()
      yield
    }
  }

  #endLoading(): void {
    this.#shared.loading?.sums.dispose()
    this.#shared.loading = null
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

  /** Lets the matrices out of memory, where that was asked for. */
  get offload(): Offload | null {
    return this.#shared.offload
  }

  /** The same weights seen from below `name`. */
  sub(name: string | number): Weights {
    return new Weights(this.#shared, `${this.#prefix}${name}.`, this.#forTokens)
  }

  /** The same weights, for layers that every token passes: their matrices are what takes time and may be rounded. */
  forTokens(): Weights {
    return new Weights(this.#shared, this.#prefix, true)
  }

  /** The same tensors, for a network whose layers add what these adapters say. They are not disposed with it. */
  withAdapters(adapters: ReadonlyMap<string, LowRank>): Weights {
    return new Weights({ ...this.#shared, adapters }, this.#prefix, this.#forTokens)
  }

  /** What an adapter adds to the layer seen from here. */
  get adapter(): LowRank | undefined {
    return this.#shared.adapters.get(this.#prefix.slice(0, -1))
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
    const matrix = options.matrix === true
    const pack = this.#shared.pack && matrix
    const make = (): Tensor => {
      if (values) return engine.rehearsing ? Tensor.empty(shape, dtype) : Tensor.from(values(), shape, dtype)
      if (entries) return this.#load(key, shape, dtype, matrix)
      // What was drawn cannot be read again; for a plan it need not.
      if (matrix && this.offload && engine.rehearsing) return this.#rehearsed(shape, dtype, pack)
      const drawn = this.#draw(key, shape, dtype, init)
      if (pack) packWeight(drawn, this.#form)
      return drawn
    }
    const tensor = keep(make())
    tensor.requiresGrad = train && !options.buffer
    own.set(key, tensor)
    return tensor
  }

  get #form(): PackForm {
    return (this.#forTokens && this.#shared.quantize) || 'plain'
  }

  #load(key: string, shape: readonly number[], dtype: ComputeType, matrix: boolean): Tensor {
    const { entries, label, train, survey, shares, loading } = this.#shared
    const pack = this.#shared.pack && matrix
    const offload = matrix ? this.offload : null
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
    const { id, identity } = this.#file(entry.file)
    const asStored = (): Tensor => Tensor.mapped(id, entry.begin, shape, type)
    const later = (step: () => void): void => (loading ? void loading.steps.push(step) : step())
    if (survey) return asStored()
    const form = this.#form
    const bytes = pack ? packedBytes(shape[0] as number, shape[1] as number, dtype, form) : 0
    // An optimizer writes parameters in place, which a mapping does not allow; to a device a mapping is a copy.
    if (type === dtype && !train && bytes === 0 && !(offload && engine.separateMemory)) {
      const tensor = asStored()
      later(() => this.#sum(key, tensor))
      return tensor
    }
    const convert = (): Tensor => {
      const space = offload ? Tensor.absent : Tensor.empty
      // Only the packed form stays. Whoever wants the plain values, as saving does, finds them in the file.
      const tensor = keep(bytes > 0 ? asStored() : space(shape, dtype))
      if (bytes > 0) tensor.packed = keep(space([bytes], 'u8'))
      const read = (): void => {
        const plain = tensor.packed ? Tensor.empty(shape, dtype) : tensor
        if (sizeOf(shape) > 0) engine.load(plain, id, entry.begin, type)
        this.#sum(key, plain)
        if (!tensor.packed) return
        packInto(tensor.packed, plain, form)
        plain.dispose()
      }
      offload?.add(tensor, read)
      later(offload ? () => offload.admit(tensor) : read)
      return tensor
    }
    if (train || !loading || offload) return convert()
    const name = [identity, entry.begin, type, dtype, bytes > 0 && form].join(':')
    shares.push(name)
    return share(name, convert)
  }

  // Only counted: how it is read depends on a file that may not be there, at most as a copy of its own.
  #rehearsed(shape: readonly number[], dtype: ComputeType, pack: boolean): Tensor {
    const tensor = Tensor.absent(shape, dtype)
    const bytes = pack ? packedBytes(shape[0] as number, shape[1] as number, dtype, this.#form) : 0
    if (bytes > 0) tensor.packed = keep(Tensor.absent([bytes], 'u8'))
    this.offload?.add(tensor, () => {
      if (bytes > 0) Tensor.empty(shape, dtype).dispose()
    })
    return tensor
  }

  #file(path: string): { id: number; identity: string } {
    const known = this.#shared.files.get(path)
    if (known) return known
    const { dev, ino, size, mtimeNs } = statSync(path, { bigint: true })
    const file = { id: engine.openFile(path).id, identity: [dev, ino, size, mtimeNs].join(':') }
    this.#shared.files.set(path, file)
    return file
  }

  // One number a tensor keeps the check to a single wait.
  #sum(key: string, tensor: Tensor): void {
    const { loading } = this.#shared
    if (!loading) return
    const sum = loading.sums.view([1], loading.checked.length)
    loading.checked.push(key)
    engine.run('sum', [tensor], [sum], [1, tensor.size, 1, 1, 0])
    sum.dispose()
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

  /** @throws ERR_CHECKPOINT when the file has keys that nothing asked for, except those with an ignored prefix. */
  assertAllUsed(ignored: readonly string[] = []): void {
    const { entries, label } = this.#shared
    if (!entries) return
    const known = new Set(this.#all().map(([key]) => key))
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

  /** Closes the files; mapped tensors stay usable. */
  close(): void {
    for (const { id } of this.#shared.files.values()) engine.closeFile(id)
    this.#shared.files.clear()
  }

  // Waits until everything is loaded, and has been looked at.
  async #checkSums(): Promise<void> {
    const { sums, checked } = this.#shared.loading as Loading
    const values = checked.length > 0 ? await sums.floats() : []
    const bad = checked.filter((_, i) => !Number.isFinite(values[i]))
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
    const { shares, parameters, buffers } = this.#shared
    const borrowed = new Set(shares.splice(0).map(release))
    for (const [, tensor] of this.#all()) if (!borrowed.has(tensor)) tensor.dispose()
    parameters.clear()
    buffers.clear()
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
