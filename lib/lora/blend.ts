import { setImmediate } from 'node:timers/promises'
import { throwIfAborted } from '../engine/errors.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import type { LowRank } from '../nn/linear.ts'
import { keep } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'
import { type AdapterFile, type AdapterLayer, openAdapter } from './file.ts'
import { linearLayers } from './layers.ts'

/** An adapter file and how much of it is added. */
export interface AdapterChoice {
  path: string
  /** Default 1; 0 leaves it out, and below 0 it is taken away. */
  scale?: number | undefined
}

/** An adapter file with its scale, opened. */
export interface ScaledAdapter {
  readonly file: AdapterFile
  readonly scale: number
}

/** Opens adapters for a network. @throws as {@link openAdapter} */
export async function openAdapters(
  network: VelocityNetwork,
  choices: readonly AdapterChoice[],
): Promise<ScaledAdapter[]> {
  const layers = linearLayers(network)
  const opened: ScaledAdapter[] = []
  for (const { path, scale = 1 } of choices) opened.push({ file: await openAdapter(path, layers), scale })
  return opened
}

/** Several adapters' matrices of one layer as one pair of the sum of their ranks R: A [R, inputs], B [outputs, R]. */
export interface Pair {
  readonly a: Float32Array
  /** Times scale·alpha/rank of each. */
  readonly b: Float32Array
  readonly rank: number
  readonly inputs: number
  readonly outputs: number
}

/** What the adapters together add to each layer: Σ scale·(alpha/rank)·B·A as one product. Those of scale 0 have no part. */
export function* pairsOf(adapters: readonly ScaledAdapter[]): Generator<[layer: string, read: () => Pair]> {
  const users = new Map<string, [AdapterLayer, number][]>()
  for (const { file, scale } of adapters) {
    if (scale === 0) continue
    for (const [name, layer] of file.layers) users.set(name, [...(users.get(name) ?? []), [layer, scale]])
  }
  for (const [name, parts] of users) yield [name, () => joined(parts)]
}

function joined(parts: readonly [AdapterLayer, number][]): Pair {
  const [[{ inputs, outputs }]] = parts as readonly [[AdapterLayer, number]]
  const rank = parts.reduce((n, [layer]) => n + layer.rank, 0)
  const a = new Float32Array(rank * inputs)
  const b = new Float32Array(outputs * rank)
  let row = 0
  for (const [layer, scale] of parts) {
    const own = layer.read()
    const factor = (scale * layer.alpha) / layer.rank
    a.set(own.a, row * inputs)
    for (let n = 0; n < outputs; n++) {
      for (let r = 0; r < layer.rank; r++) {
        b[n * rank + row + r] = factor * (own.b[n * layer.rank + r] as number)
      }
    }
    row += layer.rank
  }
  return { a, b, rank, inputs, outputs }
}

/** A network with adapters, for as long as somebody generates with it. */
export interface BlendedNetwork {
  readonly network: VelocityNetwork
  /** Frees what the adapters added; the base network stays. */
  dispose(): void
}

/**
 * The network with all adapters added as it runs; its own weights are not touched, so that networks with other
 * adapters may run beside it. Without any (or with scales of 0) it is the network itself.
 *
 * @throws ERR_CHECKPOINT, ERR_IO as {@link AdapterLayer.read}; ERR_ABORTED
 */
export async function blendAdapters(
  base: VelocityNetwork,
  adapters: readonly ScaledAdapter[],
  signal?: AbortSignal,
): Promise<BlendedNetwork> {
  const made = new Map<string, LowRank>()
  const dispose = (): void => {
    for (const { a, b } of made.values()) for (const t of [a, b]) t.dispose()
    made.clear()
  }
  try {
    for (const [name, read] of pairsOf(adapters)) {
      throwIfAborted(signal, 'loading adapters')
      const { a, b, rank, inputs, outputs } = read()
      const to = (data: Float32Array, shape: number[]): Tensor => keep(Tensor.from(data, shape, base.dtype))
      made.set(name, { a: to(a, [rank, inputs]), b: to(b, [outputs, rank]), scale: 1 })
      await setImmediate()
    }
  } catch (error) {
    dispose()
    throw error
  }
  return { network: made.size > 0 ? base.adapted(made) : base, dispose }
}
