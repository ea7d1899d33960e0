import { DTYPES, type Engine, type Operand } from './engine.ts'
import type { NativeBinding } from './native.ts'
import { OPS, type OpName } from './ops.gen.ts'

/** What a rehearsed piece of work would have taken. */
export interface Rehearsed<T> {
  readonly result: T
  /** Most bytes of tensors and of what kernels borrow at once, that the work itself makes. */
  readonly peak: number
  /** Bytes that it left behind. */
  readonly live: number
}

type Size = Pick<Operand, 'dtype' | 'shape'> | null

const NAMES: ReadonlyMap<number, OpName> = new Map(
  Object.entries(OPS).map(([name, { id }]) => [id as number, name as OpName]),
)
const TYPES = new Map(Object.entries(DTYPES).map(([name, { code }]) => [code, name as Operand['dtype']]))

const product = (values: readonly number[]): number => values.reduce((a, b) => a * b, 1)

// What the two kernels with large buffers borrow (matmul_cpu.cc, attention_forward.h), in bytes.
const TILE = { rows: 256, columns: 512, packed: 256 } as const
const PACKED_HEADS = 48 * 2 ** 20
const QUERIES = 48
const KEYS = 64

function borrowed(op: OpName, inputs: readonly Size[], outputs: readonly Size[], machine: Machine): number {
  const { threads, products } = machine
  const wide = (x: Size): number => (x?.dtype === 'bf16' && !products ? 4 * product(x.shape) : 0)
  const [a, b] = inputs
  if (op === 'matmul' || op === 'matmul_packed') {
    const shape = (outputs[0] as Operand).shape
    const n = shape[shape.length - 1] as number
    const columns = op === 'matmul' ? TILE.columns : TILE.packed
    const tile = 4 * Math.min(product(shape) / n, TILE.rows) * Math.min(n, columns)
    // Biases are read as f32; a plain weight is copied where its type has no products.
    const bias = inputs[2]?.dtype === 'bf16' ? 4 * n : 0
    return wide(a ?? null) + (op === 'matmul' ? wide(b ?? null) : 0) + bias + threads * tile
  }
  if (op === 'attention') {
    const [batch, length, heads, d] = (b as Operand).shape as [number, number, number, number]
    const head = 2 * length * d * ((b as Operand).dtype === 'bf16' && products ? 2 : 4)
    return Math.min(PACKED_HEADS, batch * heads * head) + threads * 4 * QUERIES * (2 * KEYS + 2 * d)
  }
  return 0
}

interface Machine {
  readonly threads: number
  /** Whether bf16 is multiplied as it is. */
  readonly products: boolean
}

// Stands in for the addon: commands move counters, and nothing is allocated or computed.
class Ledger {
  live = 0
  peak = 0
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
      this.live += c[2] as number
      this.peak = Math.max(this.peak, this.live)
    }
    if (kind === 2) {
      this.live -= this.#sizes.get(c[1] as number) ?? 0
      this.#sizes.delete(c[1] as number)
    }
  }

  #run(): void {
    const c = this.#commands
    let at = 5
    const next = (): Size => {
      if ((c[at] as number) < 0) return at++, null
      const rank = c[at + 3] as number
      const dtype = TYPES.get(c[at + 2] as number) as Operand['dtype']
      const shape = [...c.subarray(at + 4, at + 4 + rank)]
      at += 4 + rank
      return { dtype, shape }
    }
    const inputs = Array.from({ length: c[2] as number }, next)
    const outputs = Array.from({ length: c[3] as number }, next)
    const op = NAMES.get(c[1] as number) as OpName
    this.peak = Math.max(this.peak, this.live + borrowed(op, inputs, outputs, this.#machine))
  }

  write(): void {}

  packBytes(n: number, k: number, dtype: number): number {
    return this.#real.packBytes(n, k, dtype)
  }
}

/**
 * Runs synchronous work of which every command is counted and none is carried out: what it would take is known before
 * anything is allocated. The numbers of its tensors do not exist; do not read them, and dispose what it returns.
 */
export function rehearse<T>(engine: Engine, fn: () => T): Rehearsed<T> {
  const { backend, threads } = engine.device
  const machine = { threads, products: /bf16|amx/.test(backend) }
  return engine.standIn((real, commands) => {
    const ledger = new Ledger(real, commands, machine)
    return {
      binding: ledger as unknown as NativeBinding,
      run: () => ({ result: fn(), peak: ledger.peak, live: ledger.live }),
    }
  })
}
