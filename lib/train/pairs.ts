import { PyraflowError } from '../engine/errors.ts'
import { coupleCoefficients, drawPosition } from '../flow/couple.ts'
import type { Stages } from '../flow/stages.ts'
import { reshape, slice } from '../ops/copy.ts'
import { downsample } from '../ops/downsample.ts'
import { mix } from '../ops/mix.ts'
import { axpby } from '../ops/pointwise.ts'
import { upsample } from '../ops/upsample.ts'
import { planHistory } from '../pyramid/history.ts'
import { latentPyramid, noisePyramid } from '../pyramid/latents.ts'
import { unitsInClip } from '../pyramid/units.ts'
import { drain, type Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'

/** Every random number of one training step, so that a recorded step can be replayed. */
export interface PairDraws {
  /** Full-resolution noise [B, C, T, H, W], of both ends of every stage. */
  noise: Tensor
  /** Another draw for the starts alone: then ends and starts are not coupled, which only ablations want. */
  startNoise?: Tensor | undefined
  /** Uniform draws of the position in the stage, per column and row. */
  position(column: number): ArrayLike<number>
  /** Uniform draws of the history corruption, per column and row. */
  corruption(column: number): ArrayLike<number>
  /** Noise for one history clip of a column; `index` counts from the newest clip back. */
  history(column: number, index: number, shape: readonly number[]): Tensor
}

export interface PairOptions {
  stages: Stages
  /** Stage of each column, e.g. [0, 1, 1, 2]; row i of the batch belongs to column i mod columns. */
  columns: readonly number[]
  /** Units to show per stage, current one included; absent = the whole clip is the target, without history. */
  unitsPerStage?: readonly number[] | undefined
  framesPerUnit?: number
  /** Upper end of the history's corruption level (31). */
  corruptRatio?: number
}

export interface TrainingPairs {
  /** Per column: history clips oldest first, then the noisy clip; each [B / columns, C, t, h, w]. */
  columns: Tensor[][]
  /** Velocity S − E of each column's noisy clip (17). */
  targets: Tensor[]
  /** τ of row b·C + c. */
  timesteps: number[]
  /** Position r per column and row. */
  ratios: number[][]
}

/** Pairs of several sets of columns, all with as many rows, as those of one network call. */
export function mergePairs(parts: readonly TrainingPairs[]): TrainingPairs {
  if (parts.length === 1) return parts[0] as TrainingPairs
  const rows = parts[0]?.ratios[0]?.length ?? 0
  const timesteps = Array.from({ length: rows }, (_, b) =>
    parts.flatMap(({ columns, timesteps: own }) => own.slice(b * columns.length, (b + 1) * columns.length)),
  )
  return {
    columns: parts.flatMap(({ columns }) => columns),
    targets: parts.flatMap(({ targets }) => targets),
    timesteps: timesteps.flat(),
    ratios: parts.flatMap(({ ratios }) => ratios),
  }
}

/** Rows c, c + C, c + 2C … of a batch. */
export function columnRows(x: Tensor, column: number, count: number): Tensor {
  const batch = x.shape[0] as number
  if (count === 1) return x
  const rest = x.shape.slice(1)
  const grouped = reshape(x, [batch / count, count, x.size / batch])
  return reshape(slice(grouped, 1, column, 1), [batch / count, ...rest])
}

/**
 * Coupled training pairs of one batch of normalised latents [B, C, T, H, W] (spec/method.md §4, §8.5; training.md §1
 * steps 3–7): one noise draw serves both ends of every stage.
 * @throws ERR_SHAPE when the batch does not divide by the columns.
 */
export function trainingPairs(latents: Tensor, draws: PairDraws, options: PairOptions): TrainingPairs {
  return drain(trainingPairsSteps(latents, draws, options))
}

/** `trainingPairs` that pauses after every column. */
export function* trainingPairsSteps(
  latents: Tensor,
  draws: PairDraws,
  options: PairOptions,
): Steps<TrainingPairs> {
  const { stages, columns, unitsPerStage, framesPerUnit: f = 1, corruptRatio = 1 / 3 } = options
  const batch = latents.shape[0] as number
  const frames = latents.shape[2] as number
  const count = columns.length
  if (latents.rank !== 5 || batch % count !== 0) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'trainingPairs',
      expected: `latents [B, C, T, H, W] with B a multiple of ${count} columns`,
      received: `[${latents.shape}]`,
    })
  }
  const rows = batch / count
  const result: TrainingPairs = { columns: [], targets: [], timesteps: new Array<number>(batch), ratios: [] }
  for (const [c, k] of columns.entries()) {
    const x = columnRows(latents, c, count)
    const units = unitsPerStage ? Math.min(unitsPerStage[k] as number, unitsInClip(frames, f)) : 1
    // The current unit: the whole clip without history, else the last f of frames 0 … (units − 1)·f.
    const start = units === 1 ? 0 : 1 + (units - 2) * f
    const length = unitsPerStage ? (units === 1 ? 1 : f) : frames
    const take = (t: Tensor): Tensor => (length === frames ? t : slice(t, 2, start, length))

    const steps = stages.count - 1 - k
    const data = latentPyramid(take(x), steps + 1)[0] as Tensor
    const noiseOf = (full: Tensor): Tensor =>
      noisePyramid(take(columnRows(full, c, count)), steps + 1)[0] as Tensor
    const noise = noiseOf(draws.noise)
    const first = draws.startNoise ? noiseOf(draws.startNoise) : noise
    const q = coupleCoefficients(stages, k)
    const begin = k === 0 ? first : axpby(first, upsample(downsample(data, 1)), q.startNoise, q.startData) // (14)
    const end = q.endNoise === 0 ? data : axpby(noise, data, q.endNoise, q.endData) // (15)

    const u = draws.position(c)
    const places = Array.from({ length: rows }, (_, b) => drawPosition(u[b] as number, stages, k))
    const ratios = places.map((p) => p.ratio)
    places.forEach((p, b) => {
      result.timesteps[b * count + c] = p.timestep
    })
    const noisy = mix(begin, end, Tensor.from(ratios)) // (16)
    result.ratios.push(ratios)
    result.targets.push(axpby(begin, end, 1, -1)) // (17)

    const history: Tensor[] = []
    if (unitsPerStage && units > 1) {
      const levels = Tensor.from(Array.from(draws.corruption(c), (v) => v * corruptRatio))
      const pieces = planHistory(units - 1, k, stages.count, f)
      // Drawn from the newest clip back, as the reference does, so that recorded draws line up.
      for (let i = pieces.length - 1; i >= 0; i--) {
        const piece = pieces[i] as (typeof pieces)[number]
        const full = slice(x, 2, piece.firstFrame, piece.frameCount)
        const clip = latentPyramid(full, stages.count - piece.level)[0] as Tensor
        history.unshift(mix(draws.history(c, pieces.length - 1 - i, clip.shape), clip, levels)) // (31)
      }
    }
    result.columns.push([...history, noisy])
    yield
  }
  return result
}
