import { Generator } from '../tensor/generator.ts'
import { sliced } from '../tensor/sliced.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { Batch } from './batches.ts'
import type { LatentSource } from './latent-source.ts'
import { lossSteps, type Objective } from './objective.ts'

/** Mean losses of held-out clips: `loss` weighs stages as training does, `stage0` … are theirs. */
export type ValidationLoss = { loss: number } & Record<string, number>

export interface ValidationOptions {
  /** Stage of each column of training, which weighs the stages. */
  columns: readonly number[]
  /** Samples of one network call at most. */
  batchSize: number
  /** Clips to use, from the first of every bucket on. */
  clips?: number | undefined
  seed: number
}

/** Every clip once at every stage, a few of one bucket at a time; the lengths change from batch to batch. */
export function validationBatches(
  source: Pick<LatentSource, 'buckets'>,
  stageCount: number,
  { batchSize, clips = Number.POSITIVE_INFINITY }: Pick<ValidationOptions, 'batchSize' | 'clips'>,
): Batch[] {
  const size = Math.max(1, Math.floor(batchSize / stageCount))
  const columns = Array.from({ length: stageCount }, (_, k) => k)
  const batches: Batch[] = []
  let left = clips
  for (const bucket of source.buckets) {
    const own = Array.from(bucket.indices.subarray(0, Math.min(left, bucket.indices.length)))
    left -= own.length
    for (let at = 0; at < own.length; at += size) {
      const some = own.slice(at, at + size)
      const indices = some.flatMap((clip) => new Array<number>(stageCount).fill(clip))
      const part = { indices, columns, shape: bucket.shape, still: false }
      batches.push({ rows: some.length, parts: [part], counter: batches.length + 1 })
    }
  }
  return batches
}

/**
 * The loss of held-out clips with the same noise, positions, lengths and captions every time, so that its changes are
 * the network's.
 */
export async function validationLoss(
  objective: Objective,
  source: LatentSource,
  options: ValidationOptions,
): Promise<ValidationLoss> {
  const { stages } = objective
  const fixed = { ...objective, captionDrop: -1 }
  const sums = new Array<number>(stages.count).fill(0)
  let clips = 0
  for (const [i, batch] of validationBatches(source, stages.count, options).entries()) {
    const generator = new Generator(options.seed).stream('validation', i)
    const { loss, metrics = {} } = await sliced(() => lossSteps(fixed, source, batch, generator), {
      grad: false,
    })
    try {
      for (let k = 0; k < stages.count; k++) {
        sums[k] = (sums[k] as number) + batch.rows * (await (metrics[`stage${k}`] as Tensor).item())
      }
    } finally {
      for (const t of [loss, ...Object.values(metrics)]) t.dispose()
    }
    clips += batch.rows
  }
  const means = sums.map((sum) => sum / clips)
  const loss = options.columns.reduce((n, k) => n + (means[k] as number), 0) / options.columns.length
  return { loss, ...Object.fromEntries(means.map((value, k) => [`stage${k}`, value])) }
}
