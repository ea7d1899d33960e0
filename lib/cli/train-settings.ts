import { z } from 'zod'
import { nearestName } from '../io/nearest-name.ts'
import { presets } from '../train/presets.ts'
import { UsageError } from './console.ts'
import { kebab } from './settings.ts'

const positive = z.int().positive()
const share = z.number().min(0).max(1)
const weight = z.number().nonnegative()

const policy = z.enum(['skip', 'rollback', 'fail'])

/** Text as a regular expression. */
const regular = z.string().transform((text, context) => {
  try {
    return new RegExp(text)
  } catch (error) {
    context.addIssue(error instanceof Error ? error.message : String(error))
    return z.NEVER
  }
})

const optimizer = z
  .strictObject({
    betas: z.tuple([share, share]).optional(),
    eps: z.number().positive().optional(),
    weightDecay: z.number().nonnegative().optional(),
    maxGradNorm: z.number().nonnegative().optional(),
    emaDecay: share.optional(),
    /** `match` is a regular expression for names. */
    decayGroups: z.array(z.strictObject({ match: regular, weightDecay: weight })).optional(),
  })
  .optional()

const shared = {
  data: z.string(),
  out: z.string(),
  steps: positive,
  batchSize: positive,
  seed: z.int().nonnegative().default(0),
  dtype: z.enum(['f32', 'bf16']).default('bf16'),
  resume: z.boolean().default(false),
  /** Folder of weights to begin from. */
  init: z.string().optional(),
  /** Fields of config.json for a new network; `_class_name` chooses its family. */
  network: z.record(z.string(), z.unknown()).optional(),
  learningRate: z.number().positive().default(1e-4),
  minLearningRate: z.number().nonnegative().default(1e-5),
  warmupSteps: z.int().nonnegative().optional(),
  schedule: z.enum(['constant', 'cosine']).default('constant'),
  checkpointEvery: positive.optional(),
  accumulate: positive.optional(),
  keepCheckpoints: positive.optional(),
  keepBest: z.boolean().optional(),
  nonFinite: z
    .union([
      policy.transform((name) => ({ policy: name })),
      z.strictObject({ policy, limit: positive.optional() }),
    ])
    .optional(),
  maxLoss: z.number().positive().optional(),
  optimizer,
  /** What is not trained on: a latent cache (dit) or clips (vae). */
  validation: z.string().optional(),
  validateEvery: positive.optional(),
  validationClips: positive.optional(),
  /** Steps between grids of videos (dit) or of clips beside their reconstructions (vae). */
  sampleEvery: positive.optional(),
}

/** Settings of `train` for the velocity network. */
export const ditSettings = z.strictObject({
  task: z.literal('dit').default('dit'),
  ...shared,
  textEncoder: z.string().optional(),
  /** Folder that `encode --text-encoder` filled: features instead of an encoder. */
  textCache: z.string().optional(),
  /** Put into the finished model folder, so that `generate` can use it. */
  vae: z.string().optional(),
  stages: z
    .strictObject({
      trainTimesteps: positive.optional(),
      shift: z.number().positive().optional(),
      stageRange: z.array(share).min(2).optional(),
      gamma: z.number().positive().optional(),
    })
    .optional(),
  sampleRatios: z.array(positive).optional(),
  framesPerUnit: positive.default(1),
  corruptRatio: share.default(1 / 3),
  captionDrop: share.default(0.1),
  posterior: z.enum(['sample', 'mean']).optional(),
  imageRatio: share.optional(),
  images: z.enum(['buckets', 'frames', 'both']).optional(),
  temporalPyramid: z.boolean().optional(),
  causal: z.boolean().optional(),
  coupledNoise: z.boolean().optional(),
  maxFrames: positive.optional(),
  rank: z.int().nonnegative().optional(),
  syncGroup: positive.optional(),
  checkpointRatio: share.optional(),
  /** Go through every branch before the first step. */
  rehearse: z.boolean().default(false),
  /** Videos to look at while training; they need `vae`. */
  samplePrompts: z.array(z.string()).min(1).optional(),
  /** How they are made: the options of `samples` besides prompts, interval and VAE. */
  sampleOptions: z
    .strictObject({
      seed: z.int().nonnegative().optional(),
      size: z.tuple([positive, positive, positive]).optional(),
      steps: positive.optional(),
      videoSteps: positive.optional(),
      guidanceScale: weight.optional(),
      videoGuidanceScale: weight.optional(),
      shownFrames: positive.optional(),
    })
    .optional(),
  /** Transformer of the model folder `init`. */
  variant: z.string().optional(),
  /** Train adapters of this rank instead of all weights. */
  loraRank: positive.optional(),
  loraAlpha: z.number().optional(),
  loraTargets: z.array(z.string()).min(1).optional(),
  preset: z.enum(['one-clip']).optional(),
})

/** Settings of `train --task vae`. */
export const vaeSettings = z.strictObject({
  task: z.literal('vae'),
  ...shared,
  /** Clips shown in every grid. */
  sampleClips: positive.optional(),
  width: positive,
  height: positive,
  frames: positive,
  fps: z.number().positive().optional(),
  crops: z
    .array(
      z.strictObject({
        size: positive,
        frames: positive,
        perClip: positive.optional(),
        from: z.number().int().nonnegative().optional(),
        until: positive.optional(),
      }),
    )
    .optional(),
  klWeight: weight.default(1e-6),
  pixelWeight: weight.default(1),
  /** Safetensors file of LPIPS; without it there is no perceptual term. */
  lpips: z.string().optional(),
  lpipsWeight: weight.default(1),
  /** Without it there is no adversarial term. */
  adversarial: z
    .strictObject({
      weight: weight.optional(),
      start: z.int().nonnegative().optional(),
      kind: z.enum(['hinge', 'vanilla']).optional(),
      learningRate: z.number().positive().optional(),
      dims: z.union([z.literal(2), z.literal(3)]).optional(),
      ndf: positive.optional(),
      layers: positive.optional(),
    })
    .optional(),
})

/** The settings with the defaults of a preset. `validating`: whether clips to validate on are given. */
export function withPreset(preset: string | undefined, validating: boolean): typeof ditSettings {
  if (preset !== 'one-clip') return ditSettings
  const { trainer, lora } = presets.oneClip
  const { validateEvery, optimizer: own, ...rest } = trainer
  return ditSettings.extend({
    steps: positive.default(rest.steps),
    batchSize: positive.default(rest.batchSize),
    learningRate: z.number().positive().default(rest.learningRate),
    warmupSteps: z.int().nonnegative().default(rest.warmupSteps),
    captionDrop: share.default(rest.captionDrop),
    checkpointEvery: positive.default(rest.checkpointEvery),
    optimizer: optimizer.default(own),
    loraRank: positive.default(lora.rank),
    ...(validating ? { validateEvery: positive.default(validateEvery) } : {}),
  }) as unknown as typeof ditSettings
}

export type DitSettings = z.output<typeof ditSettings>
export type VaeSettings = z.output<typeof vaeSettings>

/** @throws UsageError naming a field that no network has, and the nearest one that it has. */
export function checkNetwork(network: Record<string, unknown> | undefined, defaults: object): void {
  const fields = Object.keys(defaults)
  for (const key of Object.keys(network ?? {})) {
    if (fields.includes(key) || key === '_class_name') continue
    throw new UsageError(`unknown setting "network.${key}"; did you mean "${nearestName(key, fields)}"?`)
  }
}

/** @throws UsageError for settings of which one means nothing without the other. */
export function checkTogether(s: DitSettings | VaeSettings): void {
  const both: (keyof DitSettings & keyof VaeSettings)[] = ['validation', 'validateEvery']
  needs(s, [both, [...both].reverse()])
  if (s.task === 'vae') return
  needs(s, [
    ['sampleEvery', 'samplePrompts'],
    ['samplePrompts', 'sampleEvery'],
    ['samplePrompts', 'vae'],
    ['sampleOptions', 'samplePrompts'],
    ['loraAlpha', 'loraRank'],
    ['loraTargets', 'loraRank'],
    ['loraRank', 'init'],
    ['variant', 'init'],
  ])
}

function needs<S extends object>(s: S, pairs: readonly (readonly (keyof S & string)[])[]): void {
  for (const [given, missing] of pairs as [keyof S & string, keyof S & string][]) {
    if (s[given] !== undefined && s[missing] === undefined)
      throw new UsageError(`--${kebab(given)} needs --${kebab(missing)}`)
  }
}
