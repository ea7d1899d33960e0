import type { LatentNormalisation } from '../flow/normalise.ts'
import { normaliseLatents } from '../flow/normalise.ts'
import type { Stages } from '../flow/stages.ts'
import { samplePosterior } from '../models/causal-vae.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import { cast } from '../ops/cast.ts'
import { concat, slice } from '../ops/copy.ts'
import { mix } from '../ops/mix.ts'
import { mse } from '../ops/mse.ts'
import { mean } from '../ops/reduce.ts'
import { stageLengths } from '../pyramid/lengths.ts'
import { unitsInClip } from '../pyramid/units.ts'
import type { Generator } from '../tensor/generator.ts'
import { scopedSteps } from '../tensor/scope.ts'
import type { Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { ImmediateTextEncoder, TextFeatures } from '../text/encoder.ts'
import type { Batch, BatchPart } from './batches.ts'
import type { LatentSource } from './latent-source.ts'
import { mergePairs, type PairDraws, type TrainingPairs, trainingPairsSteps } from './pairs.ts'
import type { StepLoss } from './run.ts'

/** A network that another one is to agree with on some of the clips. */
export interface Teacher {
  /** Its weights want no gradient. */
  readonly network: VelocityNetwork
  /** Whether its velocity, and not that of the clip, is what is learned from clip `index` of the data. */
  readonly clips: (index: number) => boolean
}

/** What turns a batch into a loss; the same for training, validation and plans. */
export interface Objective {
  readonly model: VelocityNetwork
  readonly teacher?: Teacher | undefined
  readonly text: ImmediateTextEncoder
  readonly normalisation: LatentNormalisation
  readonly stages: Stages
  readonly framesPerUnit: number
  /** Longest clip, in latent frames; longer ones are cut. */
  readonly maxFrames: number
  readonly rank: number
  readonly syncGroup: number
  /** Last unit with its history, or the whole clip without. */
  readonly temporalPyramid: boolean
  /** Whether frames see no later frames; undefined as the network's config says. */
  readonly causal: boolean | undefined
  readonly coupledNoise: boolean
  readonly corruptRatio: number
  readonly posterior: 'sample' | 'mean'
  readonly captionDrop: number
}

/** Frames of a part's clips that are looked at. */
export function framesOf(o: Pick<Objective, 'maxFrames'>, { shape, still }: BatchPart): number {
  return still ? 1 : Math.min(o.maxFrames, shape[1] as number)
}

/** Units of the clips that each stage is to see, current one included; undefined = whole clips without history. */
export function unitsOf(o: Objective, part: BatchPart, counter: number): readonly number[] | undefined {
  const { framesPerUnit, maxFrames, rank, syncGroup, stages } = o
  const frames = framesOf(o, part)
  if (!o.temporalPyramid) return undefined
  if (frames === 1) return new Array<number>(stages.count).fill(1)
  return stageLengths({
    ...{ maxFrames, framesPerUnit, syncGroup, rank, counter },
    batchUnits: unitsInClip(frames, framesPerUnit),
    stageCount: stages.count,
  })
}

/**
 * Draws, pairs, network and loss of one batch (spec/training.md §1, steps 1–9): the mean over all samples, each weighing
 * the same whatever its resolution, and the mean of every stage beside it. Every draw comes from a stream of `generator`
 * that its purpose names.
 */
export function* lossSteps(
  o: Objective,
  source: LatentSource,
  batch: Batch,
  generator: Generator,
): Steps<StepLoss> {
  return yield* pairLoss(o, yield* inputSteps(o, source, batch, generator))
}

/** What the network is called with and compared with. */
export interface LossInputs {
  readonly pairs: TrainingPairs
  /** Stage of each column. */
  readonly columns: readonly number[]
  readonly features: TextFeatures
}

/** The first half of {@link lossSteps}: all that comes before the network. */
export function* inputSteps(
  o: Objective,
  source: LatentSource,
  batch: Batch,
  generator: Generator,
): Steps<LossInputs> {
  const prepared: TrainingPairs[] = []
  for (const [i, part] of batch.parts.entries()) {
    // The first part keeps the plain names.
    const own = i === 0 ? generator : generator.stream('part', i)
    const latents = latentsOf(o, source, part, own)
    yield
    const unitsPerStage = unitsOf(o, part, batch.counter)
    const { stages, framesPerUnit, corruptRatio } = o
    const options = { stages, columns: part.columns, framesPerUnit, corruptRatio, unitsPerStage }
    const draws = drawsOf(own, latents, batch.rows, o.coupledNoise)
    prepared.push(yield* trainingPairsSteps(latents, draws, options))
  }
  const captions = packed(batch, (part, i) => source.captions[part.indices[i] as number] as string)
  const drops = generator.stream('drop').hostUniform(captions.length)
  const features = o.text.encode(
    captions.map((text, r) => ((drops[r] as number) <= o.captionDrop ? '' : text)),
  )
  yield
  const columns = batch.parts.flatMap((part) => part.columns)
  const inputs = { pairs: mergePairs(prepared), columns, features }
  return o.teacher ? yield* scopedSteps(taught(o, o.teacher, batch, inputs)) : inputs
}

/** The same inputs with the teacher's velocities for targets where it has a say. */
function* taught(
  o: Pick<Objective, 'causal'>,
  { network, clips }: Teacher,
  batch: Batch,
  inputs: LossInputs,
): Steps<LossInputs> {
  const own = packed(batch, (part, i) => (clips(part.indices[i] as number) ? 0 : 1))
  if (!own.includes(0)) return inputs
  const velocities = yield* velocitiesOf(network, o.causal, inputs)
  const count = inputs.columns.length
  const targets = inputs.pairs.targets.map((target, c) => {
    const share = Float32Array.from({ length: batch.rows }, (_, b) => own[b * count + c] as number)
    return mix(target, cast(velocities[c] as Tensor, target.dtype), Tensor.from(share, [batch.rows]))
  })
  return { ...inputs, pairs: { ...inputs.pairs, targets } }
}

/** Velocity of every column, as `network` sees it. */
function velocitiesOf(
  network: VelocityNetwork,
  causal: boolean | undefined,
  { pairs, features }: LossInputs,
): Steps<Tensor[]> {
  return network.forwardSteps({
    columns: pairs.columns,
    timesteps: pairs.timesteps,
    text: features.embeds,
    textMask: features.mask,
    pooled: features.pooled,
    causal,
    roundTimesteps: false,
  })
}

/** One value a row of the packed call, row b·C + c being that of sample b of column c. */
function packed<T>(batch: Batch, value: (part: BatchPart, i: number) => T): T[] {
  return Array.from({ length: batch.rows }, (_, b) =>
    batch.parts.flatMap((part) => part.columns.map((_, c) => value(part, b * part.columns.length + c))),
  ).flat()
}

/** The second half: network and loss. */
export function* pairLoss(
  { model, causal, stages }: Pick<Objective, 'model' | 'causal' | 'stages'>,
  inputs: LossInputs,
): Steps<StepLoss> {
  const { pairs, columns } = inputs
  const predictions = yield* velocitiesOf(model, causal, inputs)
  const losses = predictions.map((v, c) => mse(v, pairs.targets[c] as Tensor))
  const meanOf = (list: readonly Tensor[]): Tensor =>
    mean(list.length === 1 ? (list[0] as Tensor) : concat(list, 0))
  const metrics: Record<string, Tensor> = {}
  for (let k = 0; k < stages.count; k++) {
    const own = losses.filter((_, c) => columns[c] === k)
    if (own.length > 0) metrics[`stage${k}`] = meanOf(own)
  }
  return { loss: meanOf(losses), metrics }
}

/** Normalised latents [B, C, T, H, W] of a part, cut to what is trained on. */
function latentsOf(o: Objective, source: LatentSource, part: BatchPart, generator: Generator): Tensor {
  const posterior = source.gather(part.indices)
  const frames = framesOf(o, part)
  const cut = (t: Tensor): Tensor => (t.shape[2] === frames ? t : slice(t, 2, 0, frames))
  const { mean: center, logvar } = { mean: cut(posterior.mean), logvar: cut(posterior.logvar) }
  const drawn =
    o.posterior === 'mean'
      ? center
      : samplePosterior({ mean: center, logvar }, generator.stream('posterior').normal(center.shape))
  return normaliseLatents(drawn, o.normalisation)
}

function drawsOf(generator: Generator, { shape }: Tensor, rows: number, coupled: boolean): PairDraws {
  return {
    noise: generator.stream('noise').normal(shape),
    startNoise: coupled ? undefined : generator.stream('start noise').normal(shape),
    position: (c) => generator.stream('position', c).hostUniform(rows),
    corruption: (c) => generator.stream('corruption', c).hostUniform(rows),
    history: (c, i, of) => generator.stream('history', c, i).normal(of),
  }
}
