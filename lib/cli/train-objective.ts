import type { Command } from 'commander'
import type { LatentSource } from '../train/latent-source.ts'
import type { TrainingPlan } from '../train/plan.ts'
import type { RehearsedBranch, TrainerOptions } from '../train/trainer.ts'
import { say } from './console.ts'
import { anyNumber, option, wholeNumber } from './settings.ts'

/** Flags of those settings of what is learnt and how that are worth one. */
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

/** What `objectiveOptions` wants to know of settings besides those that trainers have under the same names. */
interface Settings {
  readonly samples?: { readonly vae?: string | undefined } | undefined
  readonly vae?: string | undefined
}

/** `TrainerOptions` of the settings called `names`, without those that were not given. */
export function objectiveOptions(
  s: Settings,
  names: readonly string[],
  validation: LatentSource | undefined,
): Partial<TrainerOptions> {
  const { samples } = s
  const all = { ...s, validation, samples: samples && { ...samples, vae: samples.vae ?? s.vae } }
  const own = Object.entries(all).filter(([name, value]) => value !== undefined && names.includes(name))
  return Object.fromEntries(own) as Partial<TrainerOptions>
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
