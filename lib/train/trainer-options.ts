import { PyraflowError } from '../engine/errors.ts'
import { makeStages, type Stages } from '../flow/stages.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import { stageLengths } from '../pyramid/lengths.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { ImmediateTextEncoder } from '../text/encoder.ts'
import { BatchOrder, type BatchOrderOptions } from './batches.ts'
import type { LatentSource } from './latent-source.ts'
import type { Objective, Teacher } from './objective.ts'
import type { AdamWOptions } from './optimizer.ts'
import { type RunSettings, runSettings } from './run.ts'
import type { SampleGridOptions } from './samples.ts'
import { type RateOptions, ratesOf } from './schedule.ts'

/** What a trained network learns and how: everything that decides the numbers of a step. */
export interface ObjectiveOptions {
  /** Samples a (micro-)step; a multiple of the columns. */
  batchSize: number
  seed?: number
  stages?: Stages
  /** Columns per stage, [1, 2, 1] in the published recipe; default 1 each, 2 for the middle of three. */
  sampleRatios?: readonly number[]
  framesPerUnit?: number
  /**
   * Train the last unit of a clip given the units before it (default), or, when false, whole clips at once: then the
   * network sees no history, and `causal: false` lets frames see later ones.
   */
  temporalPyramid?: boolean
  /** Whether frames see no later frames; default as the network's config says. Saved with the weights. */
  causal?: boolean
  /** One noise for both ends of a stage (default), or, for ablations, one each. */
  coupledNoise?: boolean
  /** Upper end of the noise share of history (spec/method.md eq. 31), 1/3. */
  corruptRatio?: number
  /**
   * Train on samples of the VAE's posterior, as the published recipe does, or on its means. A posterior that is wide
   * beside its means buries what can be learnt under noise that cannot.
   */
  posterior?: 'sample' | 'mean'
  /** Share of samples that are images, 0.125 in the published recipe; default: clips as they come. */
  imageRatio?: number
  /** Where they come from: buckets of single frames, first frames of videos, or both; default the first there is. */
  images?: BatchOrderOptions['images']
  /** Probability of replacing a caption by the null condition, 0.1. */
  captionDrop?: number
  /** Latent frames of the longest clips, which others are cut to; default the longest there are. */
  maxFrames?: number
  /** Number of this process among those that share the work, and how many of them see the same clips, each at another length. */
  rank?: number
  syncGroup?: number
  /** Share of the blocks whose activations are computed again in backward, 0 to 1; default as the network says. */
  checkpointRatio?: number
  /** Micro-steps whose gradients are averaged into one update, 1. */
  accumulate?: number | undefined
  optimizer?: AdamWOptions
}

export interface TrainerOptions extends ObjectiveOptions, RateOptions, RunSettings {
  model: VelocityNetwork
  data: LatentSource
  text: ImmediateTextEncoder
  /**
   * A network whose velocities are learned from some of the clips instead of the clips' own, given the same noise, history
   * and caption: what a fine-tune should not forget (learning without forgetting, arXiv 1606.09282). It costs a
   * forward pass a step. Its weights must not want gradients.
   */
  teacher?: Teacher
  out: string
  /** What is trained; default all of the network. */
  parameters?: ReadonlyMap<string, Tensor>
  /** Writes what was trained into a folder, given its moving average by name; default: the network as a model folder. */
  write?: (dir: string, average: ReadonlyMap<string, Tensor>) => Promise<void>
  /** Clips that are not trained on, whose loss `validateEvery` asks for. */
  validation?: LatentSource
  /** Clips of `validation` to use; default all. */
  validationClips?: number
  /** Videos of fixed prompts and seeds, to look at while training. */
  samples?: SampleGridOptions
}

/** Options as they hold, once they are checked. */
export interface Resolved {
  readonly objective: Objective
  /** Stage of each column of one set of samples. */
  readonly columns: readonly number[]
  readonly batches: BatchOrder
  readonly accumulate: number
}

/** Fills in defaults. @throws ERR_OPTION or ERR_SHAPE naming the option that does not fit the others */
export function resolveTrainerOptions(o: TrainerOptions): Resolved {
  const stages = o.stages ?? makeStages()
  const ratios = o.sampleRatios ?? (stages.count === 3 ? [1, 2, 1] : new Array<number>(stages.count).fill(1))
  const whole = (n: number): boolean => Number.isSafeInteger(n) && n >= 1
  if (ratios.length !== stages.count || !ratios.every(whole)) {
    throw refused(
      'sampleRatios',
      `${stages.count} integers from 1, one over each of the stages`,
      `[${ratios}]`,
    )
  }
  const columns = ratios.flatMap((n, k) => new Array<number>(n).fill(k))
  if (!whole(o.batchSize) || o.batchSize % columns.length !== 0) {
    const expected = `a multiple of ${columns.length} columns (sampleRatios [${ratios}])`
    throw refused('batchSize', expected, o.batchSize)
  }
  for (const what of ['captionDrop', 'imageRatio', 'corruptRatio', 'checkpointRatio'] as const) {
    const value = o[what]
    if (value !== undefined && !(value >= 0 && value <= 1)) throw refused(what, 'a share from 0 to 1', value)
  }
  const { samples } = o
  for (const [what, value] of Object.entries({
    ...{ maxFrames: o.maxFrames, framesPerUnit: o.framesPerUnit, accumulate: o.accumulate },
    ...{ validationClips: o.validationClips, 'samples.every': samples?.every },
  })) {
    if (value !== undefined && !whole(value)) throw refused(what, 'an integer from 1', value)
  }
  checkTeacher(o)
  const { rank = 0, syncGroup = 1, seed = 0 } = o
  const longest = o.data.buckets.reduce((n, { shape }) => Math.max(n, shape[1] as number), 1)
  const maxFrames = o.maxFrames ?? longest
  const { framesPerUnit = 1, temporalPyramid = true } = o
  // Wrong groups and ranks are refused now, not at the first step.
  stageLengths({ maxFrames, framesPerUnit, syncGroup, rank, counter: 1, stageCount: stages.count })
  for (const source of [o.data, ...(o.validation ? [o.validation] : [])])
    checkBuckets(source, o.model, stages)
  ratesOf(o, 'constant')
  runSettings(o)
  const { imageRatio, images } = o
  // Every group of processes has an order of its own.
  const order = {
    batchSize: o.batchSize,
    columns,
    imageRatio,
    images,
    seed: seed + 1_000_003 * Math.floor(rank / syncGroup),
  }
  return {
    columns,
    batches: new BatchOrder(o.data, order),
    accumulate: o.accumulate ?? 1,
    objective: {
      ...{ model: o.model, teacher: o.teacher, text: o.text, normalisation: o.data.normalisation },
      ...{ stages, framesPerUnit },
      ...{ maxFrames, rank, syncGroup, temporalPyramid, causal: o.causal },
      coupledNoise: o.coupledNoise ?? true,
      corruptRatio: o.corruptRatio ?? 1 / 3,
      posterior: o.posterior ?? 'sample',
      captionDrop: o.captionDrop ?? 0.1,
    },
  }
}

function checkTeacher({ teacher, model }: TrainerOptions): void {
  if (!teacher) return
  const trained = [...teacher.network.parameters.values()].some((t) => t.requiresGrad)
  if (teacher.network !== model && !trained) return
  const received = trained ? 'one whose weights want gradients' : 'the same'
  throw refused('teacher', 'another network than the model, loaded without { train: true }', received)
}

function checkBuckets({ buckets }: LatentSource, model: VelocityNetwork, stages: Stages): void {
  const multiple = 2 ** stages.count
  for (const { shape } of buckets) {
    const [channels, frames, height, width] = shape as [number, number, number, number]
    const even = height % multiple === 0 && width % multiple === 0 && height > 0 && width > 0
    if (shape.length === 4 && channels === model.latentChannels && frames > 0 && even) continue
    throw new PyraflowError('ERR_SHAPE', {
      what: 'latents of the data set',
      expected: `[${model.latentChannels}, T, H, W] with H and W multiples of ${multiple} (${stages.count} stages, the lowest patched by 2)`,
      received: `[${shape}]`,
      remedy: `Encode clips whose sides are multiples of ${8 * multiple} pixels.`,
    })
  }
}

const refused = (what: string, expected: string, received: unknown): PyraflowError =>
  new PyraflowError('ERR_OPTION', { what, expected, received: String(received) })
