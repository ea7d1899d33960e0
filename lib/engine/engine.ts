import { availableParallelism } from 'node:os'
import { type ErrorCode, PyraflowError } from './errors.ts'
import { type NativeBinding, native } from './native.ts'
import { OPS, type OpName } from './ops.gen.ts'

export type DType = 'f32' | 'bf16' | 'i32' | 'u8' | 'f16' | 'f64' | 'i64'

/** How a packed weight is kept: in the type computed in, or rounded to eight bits. */
export type PackForm = 'plain' | 'int8'

/** As `PfPackForm` in native/core/op.h. */
export const PACK_FORMS: Record<PackForm, number> = { plain: 0, int8: 1 }

/** Codes as in native/core/op.h. */
export const DTYPES: Record<DType, { code: number; bytes: number }> = {
  f32: { code: 0, bytes: 4 },
  bf16: { code: 1, bytes: 2 },
  i32: { code: 2, bytes: 4 },
  u8: { code: 3, bytes: 1 },
  f16: { code: 4, bytes: 2 },
  f64: { code: 5, bytes: 8 },
  i64: { code: 6, bytes: 8 },
}

/** One operand as a command names it: a storage, where in it, and what it looks like. */
export interface Operand {
  readonly storage: number
  readonly byteOffset: number
  readonly dtype: DType
  readonly shape: readonly number[]
}

/** The environment variables PYRAFLOW_BACKEND and PYRAFLOW_THREADS win over these: whoever runs a program may cap it. */
export interface EngineOptions {
  /**
   * `auto`, `cpu`, or a capped level: `base`, `avx2`, `avx512`, `avx512_bf16`, `amx`, `ref`; or an NVIDIA GPU: `cuda`,
   * `cuda:1`. `auto` is the best CPU level (docs/cuda.md says why not a GPU).
   */
  backend?: string
  /** Compute threads; default: all available. */
  threads?: number
  /** Refuse native allocations beyond this many bytes. */
  maxMemory?: number
}

// Commands are numbers in one shared buffer, one after the other and ended by END: one call into the addon takes an op with
// the allocations and frees before it.
const COMMAND_LIMIT = 512
const END = -1
// Allocations and frees that wait for an op leave it this much room.
const MOST_WAITING = 120
const OP_RUN = 0
const OP_ALLOC = 1
const OP_FREE = 2
const OP_LOAD = 3
const OP_MAP = 4
const OP_RECORD = 10
const OP_REPLAY = 11
const OP_FORGET = 12
const MAX_RANK = 6
// Ids from here on belong to rehearsals: no storage has them.
const REHEARSED = 2 ** 40
// The last word names the job that commands belong to, until it is changed.
const JOB = COMMAND_LIMIT - 1

/** Takes the place of the addon for a while, with ids of its own. */
export interface StandIn {
  readonly binding: NativeBinding
  readonly freeIds: number[]
}

/** The door to the addon: storages, commands, fences. Tensors are built on it; users meet `engine`. */
export class Engine {
  #native: NativeBinding | undefined
  #commands = new Float64Array(COMMAND_LIMIT)
  // Where the next command goes, and whether what waits there is handed over at the end of this turn at the latest.
  #at = 0
  #turn = false
  #options: EngineOptions = {}
  #freeIds: number[] = []
  #nextId = 0
  // No two rehearsals share one: what the first has made may be used in the second.
  #nextRehearsedId = REHEARSED
  #lastJob = 0
  #lastRecording = 0
  #opened: { backend: string; threads: number } | undefined
  #rehearsing = false

  /** Settings for the first use. @throws ERR_DEVICE when the engine already runs. */
  configure(options: EngineOptions): void {
    if (this.#native) {
      throw new PyraflowError('ERR_DEVICE', {
        what: 'engine.configure came too late: the engine is already running',
        remedy: 'Configure it before the first tensor is made.',
      })
    }
    this.#options = { ...this.#options, ...options }
  }

  #start(): NativeBinding {
    if (this.#native) return this.#native
    const addon = native()
    const asked = process.env.PYRAFLOW_BACKEND ?? this.#options.backend ?? 'auto'
    const threads = Number(process.env.PYRAFLOW_THREADS ?? this.#options.threads ?? availableParallelism())
    if (!Number.isInteger(threads) || threads < 1) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'threads',
        expected: 'a whole number of 1 or more',
        received: String(threads),
      })
    }
    const [, name = asked, index = '0'] = /^(.+):(\d+)$/.exec(asked) ?? []
    this.#opened = wrap(() =>
      addon.open({
        backend: name === 'auto' || name === 'cpu' ? '' : name,
        deviceIndex: Number(index),
        threads,
        maxMemory: this.#options.maxMemory ?? 0,
        commands: this.#commands,
      }),
    )
    // process.exit() runs no native clean-up hooks: without this the engine thread would compute on while the C
    // library takes oneDNN down around it.
    process.once('exit', () => addon.close())
    this.#native = addon
    return addon
  }

  /** Whether the engine runs, so that its device is chosen. */
  get started(): boolean {
    return this.#native !== undefined
  }

  /** The backend in use, e.g. `cpu_avx512`, and its thread count. Starts the engine. */
  get device(): { backend: string; threads: number } {
    this.#start()
    return this.#opened as { backend: string; threads: number }
  }

  /** Whether tensors lie in memory of their device, which sees no mapped file. Starts the engine. */
  get separateMemory(): boolean {
    return this.device.backend.startsWith('cuda')
  }

  /** An id for a storage that has no memory yet. */
  reserve(): number {
    this.#start()
    return this.#freeIds.pop() ?? this.#nextId++
  }

  /** Queues an allocation of `bytes` for a storage without memory, by default a new one, and returns its id. */
  alloc(bytes: number, id: number = this.reserve()): number {
    this.#start()
    const c = this.#commands
    const at = this.#at
    c[at] = OP_ALLOC
    c[at + 1] = id
    c[at + 2] = bytes
    this.#wait(at + 3)
    return id
  }

  /** Queues the end of a storage's memory, and unless `keepId` of the storage. */
  free(storage: number, keepId = false): void {
    // What a rehearsal left to the garbage collector.
    if (storage >= REHEARSED && !this.#rehearsing) return
    this.#start()
    const c = this.#commands
    const at = this.#at
    c[at] = OP_FREE
    c[at + 1] = storage
    this.#wait(at + 2)
    // Commands run in order, so the id may name a new storage at once.
    if (!keepId) this.#freeIds.push(storage)
  }

  /**
   * Queues one op. Missing optional operands are null, and may be left out at the end.
   * @throws ERR_OPTION for more operands than the op has, or another number of scalars
   */
  run(
    op: OpName,
    inputs: readonly (Operand | null)[],
    outputs: readonly (Operand | null)[],
    scalars: readonly number[],
  ): void {
    const has = OPS[op]
    if (
      scalars.length !== has?.scalars.length ||
      inputs.length > has.inputs ||
      outputs.length > has.outputs
    ) {
      throw wrongCall(op, inputs.length, outputs.length, scalars.length)
    }
    this.#start()
    const c = this.#commands
    let at = this.#at
    c[at] = OP_RUN
    c[at + 1] = has.id
    c[at + 2] = inputs.length
    c[at + 3] = outputs.length
    c[at + 4] = scalars.length
    at += 5
    for (let i = 0; i < inputs.length; i++) at = putOperand(c, at, inputs[i] as Operand | null)
    for (let i = 0; i < outputs.length; i++) at = putOperand(c, at, outputs[i] as Operand | null)
    for (let i = 0; i < scalars.length; i++) c[at++] = scalars[i] as number
    this.#submit(at)
  }

  /** Hands over everything up to `end`. */
  #submit(end: number): void {
    this.#commands[end] = END
    this.#at = 0
    this.#start().submit()
  }

  /** Keeps what stands up to `end` for the next op, or for the end of this turn. */
  #wait(end: number): void {
    if (this.#rehearsing || end > MOST_WAITING) {
      this.#submit(end)
      return
    }
    this.#at = end
    if (this.#turn) return
    this.#turn = true
    queueMicrotask(() => {
      this.#turn = false
      this.#flush()
    })
  }

  /** Comes before whatever else is asked of the addon. */
  #flush(): void {
    if (this.#at > 0) this.#submit(this.#at)
  }

  /** The addon with nothing left to be handed over. */
  #flushed(): NativeBinding {
    const addon = this.#start()
    this.#flush()
    return addon
  }

  write(storage: number, byteOffset: number, data: ArrayBufferView): void {
    this.#flushed().write(storage, byteOffset, data)
  }

  async read(storage: number, byteOffset: number, target: ArrayBufferView): Promise<void> {
    await wrapAsync(this.#flushed().read(storage, byteOffset, target))
  }

  /**
   * A new job. What is queued within a job fails and is cancelled by itself; everything else belongs to job 0. Jobs run
   * in the order in which they were queued, on the same thread.
   */
  newJob(): number {
    return ++this.#lastJob
  }

  /** Runs `fn`, which must be synchronous, with its commands belonging to a job. */
  within<T>(job: number, fn: () => T): T {
    // What waits belongs to the job it was queued in.
    this.#flush()
    const before = this.#commands[JOB] as number
    this.#commands[JOB] = job
    try {
      return fn()
    } finally {
      this.#flush()
      this.#commands[JOB] = before
    }
  }

  /**
   * Resolves when everything queued so far has run.
   * @throws the first error of the job since its last fence; the job works again afterwards.
   */
  async idle(job = 0): Promise<void> {
    if (this.#native) await wrapAsync(this.within(job, () => this.#flushed().fence()))
  }

  /**
   * Drops what is queued of a job and not yet begun (of every job when none is named), and resolves when the running op
   * is done. Waits that were already under way for dropped work reject with ERR_ABORTED.
   */
  async cancel(job?: number): Promise<void> {
    if (!this.#native) return
    this.#flushed().cancel(job)
    await this.idle(job).catch(() => undefined)
  }

  /** Maps a file for `load`. @throws ERR_IO */
  openFile(path: string): { id: number; size: number } {
    return wrap(() => this.#start().openFile(path))
  }

  closeFile(id: number): void {
    this.#start().closeFile(id)
  }

  /** Queues a copy with conversion from a mapped file into an operand. */
  load(target: Operand, file: number, byteOffset: number, dtype: DType): void {
    this.#flushed()
    const c = this.#commands
    c[0] = OP_LOAD
    c[1] = file
    c[2] = byteOffset
    c[3] = DTYPES[dtype].code
    this.#submit(putOperand(c, 4, target))
  }

  /** A storage that is the mapped bytes themselves: read-only, shared, nothing copied. */
  map(file: number, byteOffset: number, bytes: number): number {
    this.#flushed()
    const id = this.reserve()
    const c = this.#commands
    c[0] = OP_MAP
    c[1] = id
    c[2] = file
    c[3] = byteOffset
    c[4] = bytes
    this.#submit(5)
    return id
  }

  /**
   * Begins to note the ops of the current job, which run as ever, and names what they become: a recording, to be ended by
   * `endRecording` and freed by `forget`. Memory that is allocated meanwhile stays with it, whatever is freed.
   */
  beginRecording(): number {
    const id = ++this.#lastRecording
    this.#recorded(OP_RECORD, id, 1)
    return id
  }

  /** Ends the noting. */
  endRecording(id: number): void {
    this.#recorded(OP_RECORD, id, 0)
  }

  /**
   * Queues all ops of a recording once more. They read and write where they did: storages from outside must still be there,
   * what was written into one meanwhile is what they read; what the recording itself wrote from the host stays.
   */
  replay(id: number): void {
    this.#recorded(OP_REPLAY, id)
  }

  /** Queues the end of a recording. Storages that it made and nobody freed stay. */
  forget(id: number): void {
    this.#recorded(OP_FORGET, id)
  }

  #recorded(kind: number, id: number, begins = 0): void {
    this.#flushed()
    const c = this.#commands
    c[0] = kind
    c[1] = id
    c[2] = begins
    this.#submit(kind === OP_RECORD ? 3 : 2)
  }

  /** Exact bytes: `live` in tensors, `cached` kept for reuse, `peak` of live, and commands still queued. */
  memory(): { live: number; cached: number; peak: number; queued: number } {
    return this.#native ? this.#flushed().memory() : { live: 0, cached: 0, peak: 0, queued: 0 }
  }

  resetPeak(): void {
    if (this.#native) this.#flushed().resetPeak()
  }

  /** Bytes of a weight [n, k] in a form that the kernels like; 0 where there is no such form. */
  packBytes(n: number, k: number, dtype: DType, form: PackForm = 'plain'): number {
    return this.#start().packBytes(n, k, DTYPES[dtype].code, PACK_FORMS[form])
  }

  /** Counts calls and seconds per op from now on. */
  profile(enabled: boolean): void {
    this.#start().profile(enabled)
  }

  profileRead(): { op: OpName; calls: number; seconds: number }[] {
    const { calls, seconds } = this.#start().profileRead()
    return (Object.keys(OPS) as OpName[])
      .map((op) => ({ op, calls: calls[OPS[op].id] ?? 0, seconds: seconds[OPS[op].id] ?? 0 }))
      .filter((row) => row.calls > 0)
      .sort((a, b) => b.seconds - a.seconds)
  }

  /** Whether commands are only counted. */
  get rehearsing(): boolean {
    return this.#rehearsing
  }

  /** What a stand-in is made of: the addon, and the buffer that commands stand in. Starts the engine. */
  get parts(): { real: NativeBinding; commands: Float64Array } {
    return { real: this.#start(), commands: this.#commands }
  }

  /** Lets a stand-in take the commands of synchronous work; for `Rehearsal`. */
  standIn<T>(standIn: StandIn, fn: () => T): T {
    const real = this.#flushed()
    const [freeIds, nextId, rehearsing] = [this.#freeIds, this.#nextId, this.#rehearsing]
    this.#native = standIn.binding
    this.#freeIds = standIn.freeIds
    this.#nextId = this.#nextRehearsedId
    this.#rehearsing = true
    try {
      return fn()
    } finally {
      this.#nextRehearsedId = this.#nextId
      this.#native = real
      this.#freeIds = freeIds
      this.#nextId = nextId
      this.#rehearsing = rehearsing
    }
  }

  /** Every backend with the reason it is or is not usable; does not start the engine. */
  info(): ReturnType<NativeBinding['info']> {
    return native().info()
  }
}

function wrongCall(op: OpName, inputs: number, outputs: number, scalars: number): PyraflowError {
  const has = OPS[op]
  return new PyraflowError('ERR_OPTION', {
    what: op,
    expected: has
      ? `up to ${has.inputs} inputs and ${has.outputs} outputs, and ${has.scalars.length} scalars (${has.scalars.join(', ')})`
      : 'an op of native/ops.def',
    received: `${inputs}, ${outputs} and ${scalars}`,
  })
}

function putOperand(c: Float64Array, at: number, operand: Operand | null): number {
  if (operand === null) {
    c[at] = -1
    return at + 1
  }
  const { shape } = operand
  const rank = shape.length
  if (rank > MAX_RANK) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'tensor',
      expected: 'at most 6 dimensions',
      received: `[${shape}]`,
    })
  }
  c[at] = operand.storage
  c[at + 1] = operand.byteOffset
  c[at + 2] = DTYPES[operand.dtype].code
  c[at + 3] = rank
  for (let i = 0; i < rank; i++) c[at + 4 + i] = shape[i] as number
  return at + 4 + rank
}

// Native failures carry "CODE message": the code becomes the error's, the rest its text.
function convert(error: unknown): unknown {
  if (error instanceof PyraflowError || !(error instanceof Error)) return error
  const match = /^(ERR_[A-Z]+) (.*)$/s.exec(error.message)
  return match ? new PyraflowError(match[1] as ErrorCode, { what: match[2] as string }) : error
}

function wrap<T>(fn: () => T): T {
  try {
    return fn()
  } catch (error) {
    throw convert(error)
  }
}

async function wrapAsync<T>(promise: Promise<T>): Promise<T> {
  try {
    return await promise
  } catch (error) {
    throw convert(error)
  }
}

/** The process's engine: one native thread with a queue. */
export const engine: Engine = new Engine()
