import type { Command } from 'commander'
import { z } from 'zod'
import type { LatentSource } from '../train/latent-source.ts'
import type { TrainingPlan } from '../train/plan.ts'
import type { RehearsedBranch, TrainerOptions } from '../train/trainer.ts'
import { say } from './console.ts'
import { anyNumber, option, wholeNumber } from './settings.ts'

const positive = z.int().positive()
const share = z.number().min(0).max(1)

/** Settings of `train --task dit` that say what is learnt and how, by the names that `Trainer` has for them. */
export const objectiveSettings = {
  sampleRatios: z.array(positive).optional(),
  framesPerUnit: positive.default(1),
  temporalPyramid: z.boolean().optional(),
  causal: z.boolean().optional(),
  coupledNoise: z.boolean().optional(),
  corruptRatio: share.default(1 / 3),
  captionDrop: share.default(0.1),
  posterior: z.enum(['sample', 'mean']).optional(),
  imageRatio: share.optional(),
  images: z.enum(['buckets', 'frames', 'both']).optional(),
  maxFrames: positive.optional(),
  rank: z.int().nonnegative().optional(),
  syncGroup: positive.optional(),
  checkpointRatio: share.optional(),
  accumulate: positive.optional(),
  /** Latent cache of clips that are not trained on. */
  validation: z.string().optional(),
  validateEvery: positive.optional(),
  validationClips: positive.optional(),
  /** Needs `vae`, unless it names one of its own. */
  samples: z
    .strictObject({
      prompts: z.array(z.string()).min(1),
      every: positive,
      vae: z.string().optional(),
      seed: z.int().nonnegative().optional(),
      size: z.tuple([positive, positive, positive]).optional(),
      steps: positive.optional(),
      videoSteps: positive.optional(),
      guidanceScale: z.number().nonnegative().optional(),
      videoGuidanceScale: z.number().nonnegative().optional(),
      shownFrames: positive.optional(),
    })
    .optional(),
  /** Go through every branch before the first step. */
  rehearse: z.boolean().default(false),
}

type ObjectiveSettings = z.output<z.ZodObject<typeof objectiveSettings>>

/** Flags of the settings above that are worth one. */
export function addObjectiveFlags(command: Command): void {
  option(command, '--caption-drop <share>', 'dit: share of captions replaced by none', anyNumber)
  option(command, '--image-ratio <share>', 'dit: share of samples that are images', anyNumber)
  option(command, '--max-frames <n>', 'dit: latent frames that longer clips are cut to', wholeNumber)
  option(command, '--accumulate <n>', 'dit: batches whose gradients make one update', wholeNumber)
  option(
    command,
    '--checkpoint-ratio <share>',
    'dit: share of the blocks computed twice to save memory',
    anyNumber,
  )
  option(command, '--validation <dir>', 'dit: latent cache of clips that are not trained on')
  option(command, '--validate-every <n>', 'dit: steps between validations', wholeNumber)
  option(command, '--rehearse', 'dit: go through every branch once before the first step')
}

/** `TrainerOptions` of the settings, without those that were not given. */
export function objectiveOptions(
  s: ObjectiveSettings & { vae?: string | undefined },
  validation: LatentSource | undefined,
): Partial<TrainerOptions> {
  const { rehearse: _, samples, validation: __, ...rest } = s
  const names = Object.keys(objectiveSettings)
  const own = Object.entries({ ...rest, validation }).filter(
    ([name, value]) => value !== undefined && names.includes(name),
  )
  const vae = samples?.vae ?? s.vae
  return {
    ...Object.fromEntries(own),
    ...(samples && { samples: { ...samples, vae } }),
  } as Partial<TrainerOptions>
}

/** A plan in lines for people. */
export function describeTrainingPlan({ parameters, tokens, bytes, flops, seconds }: TrainingPlan): string[] {
  const gib = (n: number): string => `${(n / 2 ** 30).toFixed(2)} GiB`
  const tera = (n: number): string => `${(n / 1e12).toPrecision(3)} TFLOP`
  const { weights, masters, gradients, moments, ema, data, activations, peak } = bytes
  return [
    `${(parameters / 1e6).toFixed(1)} M parameters; ${tokens.shortest} to ${tokens.longest} tokens a network call, ${Math.round(tokens.mean)} on average`,
    `memory: ${gib(peak)} = weights ${gib(weights)} + masters ${gib(masters)} + gradients ${gib(gradients)} + moments ${gib(moments)} + average ${gib(ema)} + data ${gib(data)} + activations ${gib(activations)}`,
    `a step: ${tera(flops.mean)}, at most ${tera(flops.longest)}`,
    ...(seconds ? [`about ${seconds.mean.toPrecision(3)} s a step, products alone`] : []),
  ]
}

/** What a rehearsal went through, on stderr. */
export function sayRehearsal(branches: readonly RehearsedBranch[]): void {
  for (const { name, seconds, peak, loss } of branches) {
    const found = loss === undefined ? '' : `, loss ${loss.toPrecision(4)}`
    say(`rehearsed ${name}: ${seconds.toFixed(1)} s, ${(peak / 2 ** 30).toFixed(2)} GiB${found}`)
  }
}
