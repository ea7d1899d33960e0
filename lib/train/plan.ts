import { engine } from '../engine/engine.ts'
import { Rehearsal } from '../engine/rehearsal.ts'
import { velocityNetworkSteps } from '../models/load-network.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import type { Rates } from '../plan-seconds.ts'
import { frameTokens, planHistory, visiblePairs } from '../pyramid/history.ts'
import { unitsInClip } from '../pyramid/units.ts'
import { Generator } from '../tensor/generator.ts'
import { sliced } from '../tensor/sliced.ts'
import { backwardSteps, type Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { ImmediateTextEncoder } from '../text/encoder.ts'
import type { Batch } from './batches.ts'
import type { LatentBucket, LatentSource } from './latent-source.ts'
import { framesOf, inputSteps, type Objective, pairLoss, unitsOf } from './objective.ts'
import { AdamW, type AdamWOptions, optimizerBytes, TRAINER_OPTIMIZER } from './optimizer.ts'
import { type ObjectiveOptions, type Resolved, resolveTrainerOptions } from './trainer-options.ts'

/** What a training step takes; nothing was allocated to find out. */
export interface TrainingPlan {
  /** Numbers that are trained. */
  readonly parameters: number
  /** Tokens of one (micro-)step's network call, text included: at the most, at the least, and on average. */
  readonly tokens: { readonly longest: number; readonly shortest: number; readonly mean: number }
  readonly bytes: {
    /** What the network computes with. */
    readonly weights: number
    /** f32 copies of bf16 weights; 0 in f32. */
    readonly masters: number
    readonly gradients: number
    readonly moments: number
    readonly ema: number
    /** Latents, noise and text of the longest batch. */
    readonly data: number
    /** What forward keeps for backward of the longest batch, and what kernels borrow. */
    readonly activations: number
    /** All of it. */
    readonly peak: number
  }
  /** Multiplications and additions of an optimizer step, all its micro-steps: on average and at the most. */
  readonly flops: { readonly mean: number; readonly longest: number }
  /** Rough, because everything but products is left out. */
  readonly seconds?: { readonly mean: number; readonly longest: number }
}

export interface PlanTrainingOptions extends ObjectiveOptions {
  /** Fields of config.json; `_class_name` chooses the family. */
  network: Readonly<Record<string, unknown>>
  dtype?: 'f32' | 'bf16'
  /** Latent sizes [C, T, H, W] of the data set and how many clips there are of each (1). */
  buckets: readonly { readonly shape: readonly number[]; readonly clips?: number }[]
  text: Pick<ImmediateTextEncoder, 'jointDim' | 'pooledDim' | 'maxLength'>
  rates?: Rates
}

/**
 * {@link TrainingPlan} of a network and a data set that need not exist.
 * @throws ERR_OPTION or ERR_SHAPE as `Trainer` does
 */
export async function planTraining(options: PlanTrainingOptions): Promise<TrainingPlan> {
  const { network, dtype = 'f32', rates, buckets, text, ...rest } = options
  let first = 0
  const data: Imagined = {
    buckets: buckets.map(({ shape, clips = 1 }) => {
      const indices = Int32Array.from({ length: clips }, (_, i) => first + i)
      first += clips
      return { shape, indices }
    }),
  }
  const rehearsal = new Rehearsal(engine)
  const { within } = rehearsal
  const make = (): Steps<VelocityNetwork> => velocityNetworkSteps(network, { seed: 0, dtype, train: true })
  const model = await sliced(make, { grad: false, within })
  const { checkpointRatio } = rest
  if (checkpointRatio !== undefined) model.checkpointing = checkpointRatio > 0 && checkpointRatio
  const unused = { out: '', steps: 1, learningRate: 1, warmupSteps: 0 }
  const encoder = imaginedText(text)
  const settings = { ...rest, ...unused, model, text: encoder, data: imaginedSource(data) }
  const resolved = resolveTrainerOptions(settings)
  const { parameters } = within(
    () => new AdamW(model.parameters, { ...TRAINER_OPTIMIZER, ...rest.optimizer }),
  )
  return await measure({ ...rest, ...resolved, data, text: encoder }, parameters, rehearsal, rates)
}

/** The plan of a trainer that is there. */
export async function planTrainer(
  parts: Resolved & { data: LatentSource; text: ImmediateTextEncoder; optimizer?: AdamWOptions },
  parameters: ReadonlyMap<string, Tensor>,
  rates: Rates | undefined,
): Promise<TrainingPlan> {
  return await measure(parts, parameters, new Rehearsal(engine), rates)
}

type Imagined = Pick<LatentSource, 'buckets'>

async function measure(
  parts: Resolved & { data: Imagined; text: ImmediateTextEncoder; optimizer?: AdamWOptions },
  parameters: ReadonlyMap<string, Tensor>,
  rehearsal: Rehearsal,
  rates: Rates | undefined,
): Promise<TrainingPlan> {
  const { batches, accumulate, data } = parts
  // Tensors of a rehearsal mean nothing afterwards: nobody may keep those that this one makes.
  const source = imaginedSource(data)
  const { teacher } = parts.objective
  const objective = {
    ...{ ...parts.objective, text: imaginedText(parts.text) },
    teacher: teacher && { ...teacher, clips: () => true },
  }
  const { model } = objective
  const sizeOf = (batch: Batch): CallSize => callSize(objective, batch)
  const kinds = allLengths(objective, batches.kinds()).map((batch) => ({ batch, size: sizeOf(batch) }))
  const byTokens = kinds.sort((a, b) => a.size.tokens - b.size.tokens)
  const [shortest, longest] = [byTokens[0], byTokens.at(-1)] as [Kind, Kind]
  const cost = await rehearseStep(objective, source, longest.batch, rehearsal)
  const least = shortest === longest ? cost : await rehearseStep(objective, source, shortest.batch, rehearsal)

  // Products grow with the tokens, but for those of conditioning; attention with the pairs that see each other.
  const span = longest.size.tokens - shortest.size.tokens
  const slope = span > 0 ? (cost.linear - least.linear) / span : 0
  const costOf = ({ tokens, pairs }: CallSize): { linear: number; attention: number } => ({
    linear: cost.linear + slope * (tokens - longest.size.tokens),
    attention: (cost.attention * pairs) / longest.size.tokens ** 2,
  })
  // As many batches as show every length of every bucket about equally often.
  const count = Math.min(2000, 16 * kinds.length)
  const some: CallSize[] = []
  await sliced(
    function* () {
      for (let n = 0; n < count; n++) {
        some.push(sizeOf(batches.at(n)))
        yield
      }
    },
    { grad: false },
  )
  const meanOf = (value: (size: CallSize) => number): number =>
    some.reduce((n, size) => n + value(size), 0) / some.length
  const mean = { linear: meanOf((s) => costOf(s).linear), attention: meanOf((s) => costOf(s).attention) }
  const most = costOf(longest.size)
  const flops = (c: { linear: number; attention: number }): number => accumulate * (c.linear + c.attention)
  const seconds = (c: { linear: number; attention: number }, r: Rates): number =>
    accumulate * (c.linear / r.matmul + c.attention / r.attention)

  const fixed = optimizerBytes(parameters, model.dtype, { ...TRAINER_OPTIMIZER, ...parts.optimizer })
  const trained = new Set(parameters.values())
  const frozen = [...model.parameters.values(), ...model.buffers.values()].filter((t) => !trained.has(t))
  const weights = fixed.weights + frozen.reduce((n, t) => n + t.bytes, 0)
  const { data: dataBytes, peak } = cost
  return {
    parameters: [...parameters.values()].reduce((n, t) => n + t.size, 0),
    tokens: {
      longest: longest.size.tokens,
      shortest: shortest.size.tokens,
      mean: meanOf(({ tokens }) => tokens),
    },
    bytes: {
      ...{ ...fixed, weights, data: dataBytes, activations: peak - dataBytes },
      peak: weights + fixed.masters + fixed.gradients + fixed.moments + fixed.ema + peak,
    },
    flops: { mean: flops(mean), longest: flops(most) },
    ...(rates && { seconds: { mean: seconds(mean, rates), longest: seconds(most, rates) } }),
  }
}

interface Kind {
  readonly batch: Batch
  readonly size: CallSize
}

/** Forward and backward of a batch, counted. */
async function rehearseStep(
  objective: Objective,
  source: LatentSource,
  batch: Batch,
  { lap, within }: Rehearsal,
): Promise<{ data: number; peak: number; linear: number; attention: number }> {
  const before = lap().live
  const data = { live: 0, peak: 0, flops: 0, attention: 0 }
  await sliced(
    function* () {
      const inputs = yield* inputSteps(objective, source, batch, new Generator(0))
      Object.assign(data, lap())
      yield* backwardSteps((yield* pairLoss(objective, inputs)).loss)
    },
    { within },
  )
  const net = lap()
  const attention = data.attention + net.attention
  return {
    data: data.live - before,
    peak: Math.max(data.peak, net.peak) - before,
    linear: data.flops + net.flops - attention,
    attention,
  }
}

/** Tokens of all sequences of a packed call, text included, and how many pairs of them see each other. */
interface CallSize {
  readonly tokens: number
  readonly pairs: number
}

function callSize(o: Objective, batch: Batch): CallSize {
  const { model, stages, framesPerUnit: f, text } = o
  const causal = o.causal ?? model.config.use_temporal_causal
  let [tokens, pairs] = [0, 0]
  for (const part of batch.parts) {
    const frames = framesOf(o, part)
    const units = unitsOf(o, part, batch.counter)
    const [, , height, width] = part.shape as [number, number, number, number]
    const per = (level: number): number => frameTokens(height, width, level, stages.count)
    const times = (n: number, of: number): number[] => new Array<number>(n).fill(of)
    for (const k of part.columns) {
      const m = units && Math.min(units[k] as number, unitsInClip(frames, f))
      const history = m && m > 1 ? planHistory(m - 1, k, stages.count, f) : []
      const byFrame = [
        ...history.flatMap(({ frameCount, level }) => times(frameCount, per(level))),
        ...times(m === undefined ? frames : m > 1 ? f : 1, per(k)),
      ]
      tokens += batch.rows * byFrame.reduce((a, b) => a + b, text.maxLength)
      pairs += batch.rows * visiblePairs(text.maxLength, byFrame, causal)
    }
  }
  return { tokens, pairs }
}

/** The same batches at every length that their clips will be trained at, each once. */
export function allLengths(o: Objective, batches: readonly Batch[]): Batch[] {
  const turns = Math.floor(unitsInClip(o.maxFrames, o.framesPerUnit) / o.syncGroup)
  return batches.flatMap((batch) => {
    const seen = new Map<string, Batch>()
    for (let counter = 1; counter <= turns; counter++) {
      const key = batch.parts.map((part) => unitsOf(o, part, counter)?.join()).join(';')
      if (!seen.has(key)) seen.set(key, { ...batch, counter })
    }
    return [...seen.values()]
  })
}

function imaginedSource({ buckets }: Imagined): LatentSource {
  const length = buckets.reduce((n, { indices }) => n + indices.length, 0)
  const unit = { shift: 0, scale: 1 }
  return {
    ...{ buckets, length, captions: new Array<string>(length).fill('') },
    normalisation: { image: unit, video: unit },
    gather: (indices) => {
      const { shape } = buckets.find(({ indices: own }) => own.includes(indices[0] as number)) as LatentBucket
      const empty = (): Tensor => Tensor.empty([indices.length, ...shape])
      return { mean: empty(), logvar: empty() }
    },
  }
}

function imaginedText(
  text: Pick<ImmediateTextEncoder, 'jointDim' | 'pooledDim' | 'maxLength'>,
): ImmediateTextEncoder {
  const { jointDim, pooledDim, maxLength } = text
  return {
    ...{ jointDim, pooledDim, maxLength },
    encode: (prompts) => ({
      embeds: Tensor.empty([prompts.length, maxLength, jointDim]),
      mask: prompts.map(() => new Array<number>(maxLength).fill(1)),
      pooled: Tensor.empty([prompts.length, pooledDim]),
    }),
  }
}
