import { setImmediate } from 'node:timers/promises'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { nearestName } from '../io/nearest-name.ts'
import { writeSafetensors } from '../io/safetensors.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import { tensorsToWrite } from '../nn/export.ts'
import type { LowRank } from '../nn/linear.ts'
import type { ComputeType } from '../nn/weights.ts'
import { Generator } from '../tensor/generator.ts'
import { keep } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'
import { openAdapter } from './file.ts'
import { attentionProjections, type LayerSize, linearLayers } from './layers.ts'

export interface LoraOptions {
  /** Columns of B and rows of A. Default 16. */
  rank?: number | undefined
  /** A layer adds (alpha/rank)·B(A x). Default: the rank. */
  alpha?: number | undefined
  /** Ends of layer names, whole parts between points: `to_q`, `ff.net.2`. Default {@link attentionProjections}. */
  targets?: readonly string[] | undefined
  /** Of A's values. Default 0. */
  seed?: number | bigint | undefined
}

export interface SaveLoraOptions {
  /** Values to write by name of `parameters`, e.g. a moving average. Default: what is being trained. */
  tensors?: ReadonlyMap<string, Tensor> | undefined
  /** Hash of the network it was trained on (`folderFingerprint`), so that another one is noticed later. */
  base?: string | undefined
  /** How it was trained, as JSON. */
  recipe?: object | undefined
  /** Default `f32`. */
  dtype?: ComputeType | undefined
  signal?: AbortSignal | undefined
}

type Layers = ReadonlyMap<string, LowRank & { readonly rank: number; readonly alpha: number }>

/**
 * Low-rank adapters of a network's linear layers (LoRA, arXiv 2106.09685): y = W x + b + (alpha/rank)·B(A x), where
 * W and b stay as they are and neither has nor needs gradients. Give `network` and `parameters` to a trainer.
 */
export class Lora {
  /** The base network with the adapters; it shares the base's weights. */
  readonly network: VelocityNetwork
  /** What is trained, under the keys that are saved but for their `transformer.`: A [rank, inputs] and B [outputs, rank]. */
  readonly parameters: ReadonlyMap<string, Tensor>
  readonly #layers: Layers

  private constructor(base: VelocityNetwork, layers: Layers) {
    for (const { a, b } of layers.values()) for (const t of [a, b]) t.requiresGrad = true
    this.#layers = layers
    this.network = base.adapted(layers)
    this.parameters = new Map(
      [...layers].flatMap(([name, { a, b }]): [string, Tensor][] => [
        [`${name}.lora_A.weight`, a],
        [`${name}.lora_B.weight`, b],
      ]),
    )
  }

  /**
   * New adapters, in the type the network computes in: A normal with variance 1/inputs, each from a stream named by its
   * layer, and B zero, so that the network begins as it was.
   *
   * @throws ERR_OPTION for a rank or alpha that is none, a target that no layer has (naming the nearest), or a network
   * whose own weights are packed or trained
   */
  static create(base: VelocityNetwork, options: LoraOptions = {}): Lora {
    const { rank = 16, alpha = rank, targets = attentionProjections, seed = 0 } = options
    if (!Number.isSafeInteger(rank) || rank < 1) throw wrong('rank', 'a whole number from 1', String(rank))
    if (!Number.isFinite(alpha) || alpha === 0) throw wrong('alpha', 'a number other than 0', String(alpha))
    checkFrozen(base)
    const generator = new Generator(seed).stream('lora')
    const layers = new Map<string, LowRank & { rank: number; alpha: number }>()
    for (const [name, { inputs, outputs }] of chosen(linearLayers(base), targets)) {
      const std = 1 / Math.sqrt(inputs)
      const a = keep(generator.stream(name).normal([rank, inputs], { std, dtype: base.dtype }))
      const b = keep(Tensor.zeros([outputs, rank], base.dtype))
      layers.set(name, { a, b, rank, alpha, scale: alpha / rank })
    }
    return new Lora(base, layers)
  }

  /**
   * Adapters from a file, to train them on.
   *
   * @throws ERR_IO, ERR_CHECKPOINT as `openAdapter`; ERR_OPTION as {@link Lora.create}; ERR_ABORTED
   */
  static async load(
    base: VelocityNetwork,
    path: string,
    options: { signal?: AbortSignal } = {},
  ): Promise<Lora> {
    checkFrozen(base)
    const file = await openAdapter(path, linearLayers(base))
    const layers = new Map<string, LowRank & { rank: number; alpha: number }>()
    try {
      for (const [name, { rank, alpha, inputs, outputs, read }] of file.layers) {
        throwIfAborted(options.signal, 'loading')
        const own = read()
        const [a, b] = [
          keep(Tensor.from(own.a, [rank, inputs], base.dtype)),
          keep(Tensor.from(own.b, [outputs, rank], base.dtype)),
        ]
        layers.set(name, { a, b, rank, alpha, scale: alpha / rank })
        await setImmediate()
      }
    } catch (error) {
      for (const { a, b } of layers.values()) for (const t of [a, b]) t.dispose()
      throw error
    }
    return new Lora(base, layers)
  }

  /**
   * Writes the adapters under the keys of peft and diffusers, `transformer.<layer>.lora_A.weight` and `.lora_B.weight`,
   * atomically; rank and alpha are in the header as diffusers keeps them.
   *
   * @throws ERR_IO, ERR_ABORTED
   */
  async save(path: string, options: SaveLoraOptions = {}): Promise<void> {
    const { tensors = this.parameters, base, recipe, dtype = 'f32', signal } = options
    const named = Array.from(tensors, ([key, t]): [string, Tensor] => [`transformer.${key}`, t])
    const metadata: Record<string, string> = {
      ...{ format: 'pt', ...this.#settings() },
      ...(base === undefined ? {} : { base_model_hash: base }),
      ...(recipe === undefined ? {} : { recipe: JSON.stringify(recipe) }),
    }
    await writeSafetensors(path, tensorsToWrite(named, dtype), metadata, signal ? { signal } : {})
  }

  // Layers of other ranks than the first are there only when adapters of another program are trained on.
  #settings(): Record<string, string> {
    const all = [...this.#layers]
    const [, first] = all[0] as (typeof all)[number]
    const other = (key: 'rank' | 'alpha'): Record<string, number> =>
      Object.fromEntries(all.filter(([, l]) => l[key] !== first[key]).map(([name, l]) => [name, l[key]]))
    const settings = {
      'transformer.r': first.rank,
      'transformer.lora_alpha': first.alpha,
      'transformer.target_modules': all.map(([name]) => name),
      'transformer.rank_pattern': other('rank'),
      'transformer.alpha_pattern': other('alpha'),
    }
    const { rank, alpha } = first
    return { rank: String(rank), alpha: String(alpha), lora_adapter_metadata: JSON.stringify(settings) }
  }

  /** Frees the adapters; the base network stays. */
  dispose(): void {
    for (const t of this.parameters.values()) t.dispose()
  }
}

// What is added to a packed weight has no way back through it.
function checkFrozen(base: VelocityNetwork): void {
  const all = [...base.parameters.values()]
  if (!all.some((t) => t.packed || t.requiresGrad)) return
  const received = all.some((t) => t.packed) ? 'packed weights' : 'weights that are trained'
  throw wrong('network', 'one loaded with { train: false, pack: false }', received)
}

function chosen(layers: ReadonlyMap<string, LayerSize>, targets: readonly string[]): Map<string, LayerSize> {
  const ends = (name: string, target: string): boolean => name === target || name.endsWith(`.${target}`)
  const names = [...layers.keys()]
  // The usual projections are a list for both families, neither of which has all in every block.
  const given = targets === attentionProjections ? [] : targets
  for (const target of given) {
    if (names.some((name) => ends(name, target))) continue
    const near = nearestName(
      target,
      new Set(names.map((name) => name.split('.').slice(-target.split('.').length).join('.'))),
    )
    throw wrong('targets', `ends of layer names, such as ${near}`, target)
  }
  if (targets.length === 0) throw wrong('targets', 'ends of layer names', 'none')
  return new Map([...layers].filter(([name]) => targets.some((target) => ends(name, target))))
}

function wrong(what: string, expected: string, received: string): PyraflowError {
  return new PyraflowError('ERR_OPTION', { what: `LoRA: ${what}`, expected, received })
}
