import { type FileHandle, open } from 'node:fs/promises'
import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { ioError } from '../io/atomic.ts'
import { writePretrained } from '../io/pretrained.ts'
import { openSafetensors, type TensorEntry, type TensorToWrite } from '../io/safetensors.ts'
import { tensorsToWrite } from '../nn/export.ts'
import { keep } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'

/** Parameters that decay in a way of their own. */
export interface DecayGroup {
  /** By name, or by name and shape. */
  readonly match: RegExp | ((name: string, shape: readonly number[]) => boolean)
  readonly weightDecay: number
}

export interface AdamWOptions {
  betas?: readonly [number, number]
  eps?: number
  /** Not applied to biases and one-dimensional parameters. */
  weightDecay?: number
  /** Exceptions from both; the first that matches decides. They may change when a run is resumed. */
  decayGroups?: readonly DecayGroup[]
  /** Global gradient norm above which gradients are scaled down; 0 = never. */
  maxGradNorm?: number
  /** Decay of the f32 moving average; 0 = none. Early steps use min(decay, (1 + n)/(10 + n)). */
  emaDecay?: number
}

/** What trainers of velocity networks ask for unless told otherwise. */
export const TRAINER_OPTIMIZER: AdamWOptions = { emaDecay: 0.999 }

interface DecayRun {
  readonly offset: number
  readonly count: number
  readonly decay: number
}

type Parameters = ReadonlyMap<string, Tensor>

const decays = (name: string, { shape }: Tensor): boolean => shape.length > 1 && !name.endsWith('.bias')

// What decays by default, then the rest. Decay groups do not change the order, because saved states have it.
function flatOrder(parameters: Parameters): {
  ordered: [string, Tensor][]
  offsets: Map<string, number>
  size: number
} {
  const ordered = [...parameters].sort((a, b) => Number(decays(...b)) - Number(decays(...a)))
  const offsets = new Map<string, number>()
  let size = 0
  for (const [name, t] of ordered) {
    offsets.set(name, size)
    // Every parameter begins on a cache line.
    size += Math.ceil(t.size / 32) * 32
  }
  return { ordered, offsets, size }
}

// Stretches of the flat order that decay alike: two, unless groups cut them up.
function decayRuns(
  ordered: readonly [string, Tensor][],
  offsets: ReadonlyMap<string, number>,
  size: number,
  { weightDecay, decayGroups }: Required<AdamWOptions>,
): DecayRun[] {
  const decayOf = (name: string, t: Tensor): number => {
    const group = decayGroups.find(({ match }) =>
      typeof match === 'function' ? match(name, t.shape) : name.search(match) >= 0,
    )
    return group?.weightDecay ?? (decays(name, t) ? weightDecay : 0)
  }
  const runs: { offset: number; count: number; decay: number }[] = []
  ordered.forEach(([name, t], i) => {
    const offset = offsets.get(name) as number
    const next = ordered[i + 1]
    const end = next ? (offsets.get(next[0]) as number) : size
    const decay = decayOf(name, t)
    const last = runs.at(-1)
    if (last?.decay === decay) last.count = end - last.offset
    else runs.push({ offset, count: end - offset, decay })
  })
  return runs
}

/** Bytes that an optimizer of such parameters takes, by what they are for. The parameters move into the first of them. */
export function optimizerBytes(
  parameters: Parameters,
  dtype: 'f32' | 'bf16',
  { emaDecay = 0 }: AdamWOptions,
): { weights: number; masters: number; gradients: number; moments: number; ema: number } {
  const { size } = flatOrder(parameters)
  const wide = 4 * size
  return {
    weights: dtype === 'bf16' ? 2 * size : wide,
    masters: dtype === 'bf16' ? wide : 0,
    gradients: wide,
    moments: 2 * wide,
    ema: emaDecay > 0 ? wide : 0,
  }
}

function checkOptions(o: Required<AdamWOptions>): void {
  const share = (x: number): boolean => x >= 0 && x < 1
  const size = (x: number): boolean => x >= 0 && Number.isFinite(x)
  const checks: [string, boolean, string, unknown][] = [
    ['betas', o.betas.length === 2 && o.betas.every(share), 'two numbers from 0 to below 1', o.betas],
    ['eps', o.eps > 0, 'a number above 0', o.eps],
    ['weightDecay', size(o.weightDecay), 'a number from 0', o.weightDecay],
    ['maxGradNorm', size(o.maxGradNorm), 'a number from 0', o.maxGradNorm],
    ['emaDecay', share(o.emaDecay), 'a number from 0 to below 1', o.emaDecay],
    ...o.decayGroups.map(({ weightDecay: w }, i): [string, boolean, string, unknown] => [
      `decayGroups[${i}].weightDecay`,
      size(w),
      'a number from 0',
      w,
    ]),
  ]
  for (const [what, fine, expected, received] of checks) {
    if (!fine) throw new PyraflowError('ERR_OPTION', { what, expected, received: String(received) })
  }
}

/**
 * AdamW over one flat f32 master copy (spec/training.md §3). The model's parameters become views of it, or of a bf16
 * shadow that every step refreshes, and their gradients views of one flat buffer: a step is five kernel calls however
 * many parameters there are. A step whose gradients are not finite changes nothing.
 */
export class AdamW {
  readonly parameters: ReadonlyMap<string, Tensor>
  readonly size: number
  readonly #options: Required<AdamWOptions>
  readonly #offsets: ReadonlyMap<string, number>
  readonly #runs: readonly DecayRun[]
  readonly #master: Tensor
  readonly #shadow: Tensor | null
  readonly #grad: Tensor
  readonly #m: Tensor
  readonly #v: Tensor
  readonly #ema: Tensor | null
  #stepCount = 0

  constructor(parameters: ReadonlyMap<string, Tensor>, options: AdamWOptions = {}) {
    this.#options = {
      betas: options.betas ?? [0.9, 0.95],
      eps: options.eps ?? 1e-8,
      weightDecay: options.weightDecay ?? 1e-4,
      maxGradNorm: options.maxGradNorm ?? 1,
      emaDecay: options.emaDecay ?? 0,
      decayGroups: options.decayGroups ?? [],
    }
    checkOptions(this.#options)
    this.parameters = parameters
    const { ordered, offsets, size } = flatOrder(parameters)
    this.size = size
    this.#offsets = offsets
    this.#runs = decayRuns(ordered, offsets, size, this.#options)
    const flat = (): Tensor => keep(Tensor.zeros([size]))
    this.#master = flat()
    this.#grad = flat()
    this.#m = flat()
    this.#v = flat()
    const bf16 = ordered.some(([, t]) => t.dtype === 'bf16')
    this.#shadow = bf16 ? keep(Tensor.zeros([size], 'bf16')) : null
    for (const [name, t] of ordered) {
      const offset = offsets.get(name) as number
      if (bf16 && t.dtype !== 'bf16') {
        throw new PyraflowError('ERR_DTYPE', {
          what: `parameter ${name}`,
          expected: 'bf16 like the others',
          received: t.dtype,
        })
      }
      if (this.#shadow) {
        const place = this.#master.view(t.shape, offset)
        engine.run('cast', [t], [place], [])
        place.dispose()
      }
      t.rebase(this.#shadow ?? this.#master, offset)
      t.grad = keep(this.#grad.view(t.shape, offset))
    }
    this.#ema = this.#options.emaDecay > 0 ? flat() : null
    if (this.#ema) engine.run('axpby', [this.#master, null], [this.#ema], [1, 0, 0])
  }

  get stepCount(): number {
    return this.#stepCount
  }

  /** Bytes this optimizer holds besides the parameters' own. */
  get bytes(): number {
    return [this.#master, this.#grad, this.#m, this.#v, this.#ema, this.#shadow].reduce(
      (n, t) => n + (t?.bytes ?? 0),
      0,
    )
  }

  zeroGrad(): void {
    engine.run('fill', [], [this.#grad], [0])
  }

  /** f32[2]: the norm of the gradients collected so far and the coefficient that clips it, NaN when it is not finite. */
  gradNorm(): Tensor {
    const clip = Tensor.empty([2])
    engine.run('grad_norm', [this.#grad], [clip], [this.#options.maxGradNorm])
    return clip
  }

  /**
   * One update from the gradients collected so far, which are then zeroed. Returns `clip`, by default made here: NaN as
   * its coefficient leaves the weights as they are.
   */
  step(learningRate: number, clip: Tensor = this.gradNorm()): Tensor {
    const { betas, eps, emaDecay } = this.#options
    this.#stepCount++
    const n = this.#stepCount
    for (const { offset, count, decay } of this.#runs) {
      const part = (t: Tensor | null): Tensor | null => t?.view([count], offset) ?? null
      const views = [part(this.#grad), part(this.#master), part(this.#m), part(this.#v), part(this.#shadow)]
      const [g, p, m, v, s] = views as [Tensor, Tensor, Tensor, Tensor, Tensor | null]
      engine.run(
        'adamw',
        [g, clip],
        [p, m, v, s],
        [learningRate, betas[0], betas[1], eps, decay, 1 - betas[0] ** n, 1 - betas[1] ** n],
      )
      for (const t of views) t?.dispose()
    }
    if (this.#ema) {
      const decay = Math.min(emaDecay, (1 + n) / (10 + n))
      engine.run('axpby', [this.#ema, this.#master], [this.#ema], [decay, 1 - decay, 0])
    }
    this.zeroGrad()
    return clip
  }

  /** Runs `fn` while the model holds its moving average instead of its own weights. */
  async withEma<T>(fn: () => Promise<T>): Promise<T> {
    if (!this.#ema) return await fn()
    // In bf16 the model computes with a copy anyway; in f32 its own weights have to wait somewhere.
    const saved = this.#shadow ? null : keep(Tensor.empty([this.size]))
    if (saved) engine.run('cast', [this.#master], [saved], [])
    engine.run('cast', [this.#ema], [this.#shadow ?? this.#master], [])
    try {
      return await fn()
    } finally {
      engine.run('cast', [saved ?? this.#master], [this.#shadow ?? this.#master], [])
      saved?.dispose()
    }
  }

  /** f32 master values by parameter name, as views: what a checkpoint should hold. */
  masterTensors(): Map<string, Tensor> {
    return this.#named(this.#master)
  }

  emaTensors(): Map<string, Tensor> {
    return this.#named(this.#ema ?? this.#master)
  }

  /** Writes the moving average (or the weights, without one) and a model's buffers as a diffusers-style folder. */
  async saveEma(
    dir: string,
    config: Readonly<Record<string, unknown>>,
    dtype: 'f32' | 'bf16',
    buffers: ReadonlyMap<string, Tensor> = new Map(),
  ): Promise<void> {
    const tensors = this.emaTensors()
    try {
      await writePretrained(dir, config, [...tensorsToWrite(buffers), ...tensorsToWrite(tensors, dtype)])
    } finally {
      for (const t of tensors.values()) t.dispose()
    }
  }

  #named(flat: Tensor): Map<string, Tensor> {
    return new Map(
      Array.from(this.parameters, ([name, t]) => [
        name,
        keep(flat.view(t.shape, this.#offsets.get(name) as number)),
      ]),
    )
  }

  /** State for {@link restore}; the flat order depends only on the parameters' names and shapes. */
  stateTensors(): TensorToWrite[] {
    const parts: [string, Tensor][] = [
      ['master', this.#master],
      ['m', this.#m],
      ['v', this.#v],
    ]
    if (this.#ema) parts.push(['ema', this.#ema])
    return tensorsToWrite(parts, 'f32')
  }

  /**
   * Puts a saved state in place of the present one; gradients collected so far are forgotten.
   * @throws ERR_CHECKPOINT when the file belongs to another model; then nothing has changed. ERR_IO
   */
  async restore(path: string, stepCount: number): Promise<void> {
    const file = openSafetensors(path)
    const parts: [string, Tensor | null][] = [
      ['master', this.#master],
      ['m', this.#m],
      ['v', this.#v],
      ['ema', this.#ema],
    ]
    const found = parts.flatMap(([name, target]) => {
      if (!target) return []
      const entry = file.entries.get(name)
      if (entry?.dtype === 'F32' && entry.shape.length === 1 && entry.shape[0] === this.size)
        return [{ entry, target }]
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `${path}: optimizer state ${name}`,
        expected: `[${this.size}] f32`,
        received: entry ? `[${entry.shape}] ${entry.dtype}` : 'nothing',
        remedy: 'Resume with the model configuration that wrote it.',
      })
    })
    const handle = await open(path).catch((error: unknown) => {
      throw ioError(error, 'read checkpoint', path)
    })
    try {
      for (const { entry, target } of found) await readInto(handle, path, entry, target)
    } finally {
      await handle.close()
    }
    if (this.#shadow) engine.run('cast', [this.#master], [this.#shadow], [])
    this.zeroGrad()
    this.#stepCount = stepCount
  }

  dispose(): void {
    for (const t of this.parameters.values()) {
      t.grad?.dispose()
      t.grad = null
    }
    for (const t of [this.#master, this.#grad, this.#m, this.#v, this.#ema, this.#shadow]) t?.dispose()
  }
}

const SLICE_BYTES = 4 << 20

/** Copies a tensor of a file in pieces, none of which keeps the event loop. */
async function readInto(handle: FileHandle, path: string, entry: TensorEntry, target: Tensor): Promise<void> {
  const bytes = entry.end - entry.begin
  const piece = new Uint8Array(Math.min(SLICE_BYTES, bytes))
  for (let at = 0; at < bytes; ) {
    const { bytesRead } = await handle.read(piece, 0, Math.min(piece.length, bytes - at), entry.begin + at)
    if (bytesRead === 0) throw ioError({ message: 'the file became shorter' }, 'read checkpoint', path)
    engine.write(target.storage, target.byteOffset + at, piece.subarray(0, bytesRead))
    at += bytesRead
  }
}
