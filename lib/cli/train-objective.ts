import type { Command } from 'commander'
import type { TrainingPlan } from '../train/plan.ts'
import type { RehearsedBranch } from '../train/trainer.ts'
import { say } from './console.ts'
import { anyNumber, option, wholeNumber } from './settings.ts'
import type { DitSettings } from './train-settings.ts'

/** Flags of the settings that say what is learnt and how. */
export function addObjectiveFlags(command: Command): void {
  option(command, '--caption-drop <share>', 'dit: share of captions replaced by none', anyNumber)
  option(command, '--image-ratio <share>', 'dit: share of samples that are images', anyNumber)
  option(command, '--max-frames <n>', 'dit: latent frames that longer clips are cut to', wholeNumber)
  option(
    command,
    '--checkpoint-ratio <share>',
    'dit: share of the blocks that are computed twice to save memory',
    anyNumber,
  )
  option(command, '--rehearse', 'dit: go through every branch once before the first step')
}

/** Settings that say what is learnt and how, as trainers and plans take them. */
export function objectiveOptions(s: DitSettings) {
  const { sampleRatios, framesPerUnit, temporalPyramid, causal, coupledNoise, corruptRatio, posterior } = s
  const { imageRatio, images, captionDrop, maxFrames, rank, syncGroup, checkpointRatio } = s
  const all = {
    ...{ sampleRatios, framesPerUnit, temporalPyramid, causal, coupledNoise, corruptRatio, posterior },
    ...{ imageRatio, images, captionDrop, maxFrames, rank, syncGroup, checkpointRatio },
  }
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined)) as {
    [K in keyof typeof all]?: Exclude<(typeof all)[K], undefined>
  }
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
    say(`pyraflow: rehearsed ${name}: ${seconds.toFixed(1)} s, ${(peak / 2 ** 30).toFixed(2)} GiB${found}`)
  }
}
