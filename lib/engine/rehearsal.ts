import { convolutionBytes, product } from './convolution-bytes.ts'
import { DTYPES, type Engine, type Operand, PACK_FORMS, type StandIn } from './engine.ts'
import type { NativeBinding } from './native.ts'
import { OPS, type OpName } from './ops.gen.ts'

/** What rehearsed work would have taken since the last time it was asked for. */
export interface Lap {
  /** Most bytes of tensors and of what kernels borrow at once, counted from the beginning of the rehearsal. */
  readonly peak: number
  /** Bytes that are there now. */
  readonly live: number
  /** Multiplications and additions of matrix products, convolutions and, as if nothing were masked, attention. */
  readonly flops: number
  /** Those of them that attention takes. */
  readonly attention: number
}

type Size = Pick<Operand, 'dtype' | 'shape'> | null

const NAMES: ReadonlyMap<number, OpName> = new Map(
  Object.entries(OPS).map(([name, { id }]) => [id as number, name as OpName]),
)
const TYPES = new Map(Object.entries(DTYPES).map(([name, { code }]) => [code, name as Operand['dtype']]))

const bytesOf = (x: Size): number => (x ? product(x.shape) * DTYPES[x.dtype].bytes : 0)
const columnsOf = (x: Size | undefined, n: number): { shape: number[] } => ({
  shape: [...(x?.shape.slice(0, -1) ?? []), n],
})

// What the kernels with large buffers borrow (matmul_cpu.cc, attention_panel.h), in bytes.
const COLUMNS = { plain: 512, packed: 256 } as const
// Rows of a tile, what parts and fillings of it are multiples of: with AVX-512, and below it.
const ROWS = {
  wide: { plain: 256, packed: 128, part: 16, whole: 1 },
  narrow: { plain: 96, packed: 96, part: 12, whole: 12 },
} as const
// From how many rows on, and for which sums, a plain bf16 weight is packed (PackFor).
const PACKS = { rows: 512, least: 256, most: 2560 } as const
// Products in eight bits (int8_cpu.h): rows come in multiples, and a scale covers at most so many values.
const EIGHT = { rows: 64, group: 2048 } as const
const PACKED_HEADS = 48 * 2 ** 20
const QUERIES = { strip: 48, block: 144, backward: 128 } as const
const KEYS = { block: 64, group: 4 } as const
const CUBLAS_WORKSPACE = 32 * 2 ** 20

const ATTENTION: ReadonlySet<OpName> = new Set<OpName>(['attention', 'attention_backward'])
const COSTLY: ReadonlySet<OpName> = new Set<OpName>([
  ...(['matmul', 'matmul_pack', 'matmul_packed', 'conv3d'] as const),
  ...ATTENTION,
])

const upTo = (multiple: number, n: number): number => multiple * Math.ceil(n / multiple)

// ChooseTile of matmul_cpu.cc.
function tileOf(
  [m, n, k]: [number, number, number],
  packed: boolean,
  most: (typeof ROWS)[keyof typeof ROWS],
): [number, number] {
  let rows = Math.min(m, packed ? most.packed : most.plain)
  let columns = Math.min(n, packed ? COLUMNS.packed : COLUMNS.plain)
  for (;;) {
    const tiles = Math.ceil(m / rows) * Math.ceil(n / columns)
    if (tiles >= 16 || (2 * rows * columns + 16 * (rows + columns)) * k <= 8 << 20) return [rows, columns]
    if (columns > 256 && !packed) columns = 256
    else if (rows > 64) rows = upTo(most.part, Math.floor(rows / 2))
    else if (columns > 64 && !packed) columns = upTo(16, Math.floor(columns / 2))
    else return [rows, columns]
  }
}

function borrowed(op: OpName, inputs: readonly Size[], outputs: readonly Size[], machine: Machine): number {
  const { threads, products } = machine
  const wide = (x: Size): number => (x?.dtype === 'bf16' && !products ? 4 * product(x.shape) : 0)
  const [a, b] = inputs
  // Whole numbers of a weight, before they are packed.
  if (op === 'matmul_pack') {
    const [n, k] = (a as Operand).shape as [number, number]
    return bytesOf(outputs[0] ?? null) === machine.eightBits(n, k) ? n * k : 0
  }
  if (op === 'matmul' || op === 'matmul_packed') {
    const shape = (outputs[0] as Operand).shape
    const n = shape[shape.length - 1] as number
    const m = product(shape) / n
    const k = product(a?.shape ?? []) / m
    const most = ROWS[machine.narrow ? 'narrow' : 'wide']
    if (op === 'matmul_packed' && bytesOf(b ?? null) === machine.eightBits(n, k)) {
      // Whole numbers and scales of all rows, and a tile of whole numbers and one of their sums.
      const all = upTo(EIGHT.rows, m)
      const rows = upTo(EIGHT.rows, tileOf([all, n, k], true, most)[0])
      return all * (k + 4 * Math.ceil(k / EIGHT.group)) + threads * 8 * rows * COLUMNS.packed
    }
    const [rows, columns] = tileOf([m, n, k], op === 'matmul_packed', most)
    const last = m - rows * (Math.ceil(m / rows) - 1)
    const filled = upTo(most.whole, last)
    // The result of a tile, and its operand where rows of zeros fill it.
    const tile = 4 * ((m > rows ? rows : filled) * columns + (filled > last ? filled * k : 0))
    // Biases are read as f32; a plain weight is copied where its type has no products, packed where many rows share it.
    const bias = inputs[2]?.dtype === 'bf16' ? 4 * n : 0
    const plain = products && product(b?.shape ?? []) === n * k && [a, b].every((x) => x?.dtype === 'bf16')
    const packs = plain && m >= PACKS.rows && k >= PACKS.least && k <= PACKS.most
    const weight = op === 'matmul_packed' ? 0 : packs ? bytesOf(b ?? null) : wide(b ?? null)
    return wide(a ?? null) + weight + bias + threads * tile
  }
  if (op === 'conv3d') {
    const [x, w, y] = [a, b, outputs[0]] as [Operand, Operand, Operand]
    const type = [x, w].some(({ dtype }) => dtype === 'f32') ? 'f32' : products ? 'bf16' : 'widened'
    return convolutionBytes(x.shape, w.shape, y.shape, type, threads)
  }
  if (op === 'attention') {
    const [batch, length, heads, d] = (b as Operand).shape as [number, number, number, number]
    const head = 2 * length * d * ((b as Operand).dtype === 'bf16' && products ? 2 : 4)
    return (
      Math.min(PACKED_HEADS, batch * heads * head) +
      threads * 4 * (QUERIES.block * 2 * d + 2 * KEYS.block * QUERIES.strip)
    )
  }
  if (op === 'attention_backward') {
    const [batch, length, heads, d] = (b as Operand).shape as [number, number, number, number]
    // k, v, q and the output's gradient once by rows and, but for v, once by columns; dq, delta and the log-sum in f32.
    const head = length * (7 * d * ((b as Operand).dtype === 'bf16' && products ? 2 : 4) + 4 * (d + 2))
    // Logits and their gradients of a strip; both of a block, and for a group what dq sums, in bf16.
    const tile =
      KEYS.block * (2 * QUERIES.strip + (1 + KEYS.group / 2) * QUERIES.backward + 2 * KEYS.group * d)
    // One head a thread where heads are many, as many as there is room for where they are few.
    const each = threads - 1 <= 0.2 * batch * heads && threads * head <= PACKED_HEADS
    const packed = each ? threads * head : Math.max(head, Math.min(PACKED_HEADS, batch * heads * head))
    return packed + threads * 4 * tile
  }
  return 0
}

// What kernels of a GPU borrow (native/backends/cuda): partial sums, which only short products have, are left out.
function borrowedOnDevice(op: OpName, inputs: readonly Size[]): number {
  const [a, b] = inputs
  if (op === 'matmul' || op === 'matmul_packed') return CUBLAS_WORKSPACE
  // The weight with its taps outermost.
  if (op === 'conv3d') return bytesOf(b ?? null)
  // q and k once more when they are normalised or turned on the way.
  if (op === 'attention') return inputs.slice(5).some((x) => x) ? bytesOf(a ?? null) + bytesOf(b ?? null) : 0
  if (op === 'attention_backward') return 2 * bytesOf(inputs[6] ?? null)
  return 0
}

function flopsOf(op: OpName, inputs: readonly Size[], outputs: readonly Size[]): number {
  const [a, b] = inputs
  const out = product(outputs[0]?.shape ?? [0])
  if (op === 'matmul_packed') return 2 * out * (a?.shape.at(-1) as number)
  if (op === 'matmul') return 2 * product(a?.shape ?? []) * (outputs[0]?.shape.at(-1) as number)
  if (op === 'conv3d') return (2 * out * product(b?.shape ?? [])) / (b?.shape[0] as number)
  if (op === 'attention') return 4 * product(a?.shape ?? []) * (b?.shape[1] as number)
  // Five products where forward has two: the weights again, their gradient, and those of q, k and v.
  if (op === 'attention_backward') return 10 * product(a?.shape ?? []) * (b?.shape[1] as number)
  return 0
}

interface Machine {
  readonly threads: number
  /** Whether bf16 is multiplied as it is. */
  readonly products: boolean
  /** Whether it is a CPU without AVX-512, or used as one. */
  readonly narrow: boolean
  /** Whether it is a GPU. */
  readonly device: boolean
  /** Bytes of a weight [n, k] in eight bits; 0 where there are none. */
  readonly eightBits: (n: number, k: number) => number
}

// Stands in for the addon: commands move counters, and nothing is allocated or computed.
class Ledger {
  #live = 0
  #peak = 0
  #flops = 0
  #attention = 0
  readonly #commands: Float64Array
  readonly #real: NativeBinding
  readonly #machine: Machine
  readonly #sizes = new Map<number, number>()

  constructor(real: NativeBinding, commands: Float64Array, machine: Machine) {
    this.#real = real
    this.#commands = commands
    this.#machine = machine
  }

  submit(): void {
    const c = this.#commands
    const kind = c[0]
    if (kind === 0) this.#run()
    if (kind === 1) {
      this.#sizes.set(c[1] as number, c[2] as number)
      this.#live += c[2] as number
      this.#peak = Math.max(this.#peak, this.#live)
    }
    if (kind === 2) {
      this.#live -= this.#sizes.get(c[1] as number) ?? 0
      this.#sizes.delete(c[1] as number)
    }
  }

  #run(): void {
    const c = this.#commands
    const op = NAMES.get(c[1] as number) as OpName
    // The others borrow next to nothing.
    if (!COSTLY.has(op)) return
    let at = 5
    const next = (): Size => {
      if ((c[at] as number) < 0) {
        at++
        return null
      }
      const rank = c[at + 3] as number
      const dtype = TYPES.get(c[at + 2] as number) as Operand['dtype']
      const shape = Array.from({ length: rank }, (_, i) => c[at + 4 + i] as number)
      at += 4 + rank
      return { dtype, shape }
    }
    const inputs = Array.from({ length: c[2] as number }, next)
    const outputs = Array.from({ length: c[3] as number }, next)
    // Its result may be some columns of a wider tensor.
    if (op === 'matmul_packed')
      outputs[0] = { ...(outputs[0] as Operand), ...columnsOf(outputs[0], c[at] as number) }
    const flops = flopsOf(op, inputs, outputs)
    this.#flops += flops
    if (ATTENTION.has(op)) this.#attention += flops
    const extra = this.#machine.device
      ? borrowedOnDevice(op, inputs)
      : borrowed(op, inputs, outputs, this.#machine)
    this.#peak = Math.max(this.#peak, this.#live + extra)
  }

  /** What was taken since the last call. */
  readonly lap = (): Lap => {
    const lap = { peak: this.#peak, live: this.#live, flops: this.#flops, attention: this.#attention }
    this.#peak = this.#live
    this.#flops = 0
    this.#attention = 0
    return lap
  }

  write(): void {}

  packBytes(n: number, k: number, dtype: number, form: number): number {
    return this.#real.packBytes(n, k, dtype, form)
  }
}

/**
 * Work of which every command is counted and none is carried out: what it would take is known before anything is
 * allocated. The values of its tensors do not exist; do not read them.
 */
export class Rehearsal {
  /** What was taken since the last call. */
  readonly lap: () => Lap
  readonly #engine: Engine
  readonly #standIn: StandIn

  constructor(engine: Engine) {
    const { backend, threads } = engine.device
    const { real, commands } = engine.parts
    const machine = {
      threads,
      products: /bf16|amx/.test(backend),
      narrow: /base|avx2/.test(backend),
      device: engine.separateMemory,
      eightBits: (n: number, k: number) => real.packBytes(n, k, DTYPES.bf16.code, PACK_FORMS.int8),
    }
    const ledger = new Ledger(real, commands, machine)
    this.lap = ledger.lap
    this.#engine = engine
    this.#standIn = { binding: ledger as unknown as NativeBinding, freeIds: [] }
  }

  /** Runs a synchronous piece of it; `sliced` takes it for pieces that pause. What runs in between is not counted. */
  readonly within = <T>(fn: () => T): T => this.#engine.standIn(this.#standIn, fn)
}

/** A rehearsal of one synchronous piece. */
export function rehearse<T>(engine: Engine, fn: (lap: () => Lap) => T): T {
  const { lap, within } = new Rehearsal(engine)
  return within(() => fn(lap))
}
