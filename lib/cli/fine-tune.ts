import { existsSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import type { Command } from 'commander'
import type { TrainerOptions } from '../train/trainer.ts'
import { type ProgressMode, say, UsageError } from './console.ts'
import { TEXT_FOLDER } from './encode.ts'
import { anyNumber, option, wholeNumber } from './settings.ts'
import { type Done, follow } from './train-progress.ts'
import type { DitSettings } from './train-settings.ts'

/** Whether `--init` names a whole model and not the weights of a network: then the run goes on from all that it says. */
export function goesOn({ init, loraRank, preset }: DitSettings): boolean {
  // A folder without config.json is a model, or what it is will be said when it is opened.
  return (
    init !== undefined &&
    (loraRank !== undefined || preset !== undefined || !existsSync(join(init, 'config.json')))
  )
}

/** Flags of runs that go on from a model folder. */
export function addFineTuneFlags(command: Command): void {
  option(command, '--variant <name>', 'dit: folder of the transformer when --init has several')
  option(command, '--lora-rank <n>', 'dit: train adapters of this rank for the model --init', wholeNumber)
  option(command, '--lora-alpha <n>', 'dit: their strength is alpha/rank (default: 1)', anyNumber)
  const names = (text: string): string[] => text.split(',')
  option(
    command,
    '--lora-targets <names>',
    'dit: ends of names of layers to adapt, e.g. to_q,ff.net.2',
    names,
  )
  option(command, '--preset <name>', 'dit: one-clip: adapters and small steps for a single clip')
}

/** Trains the transformer of a whole model folder, or adapters for it. */
export async function fineTune(
  s: DitSettings & { init?: string },
  options: Omit<TrainerOptions, 'model' | 'data' | 'text'>,
  mode: ProgressMode | undefined,
  signal: AbortSignal,
): Promise<Done> {
  for (const name of ['stages', 'network'] as const)
    if (s[name]) throw new UsageError(`"${name}" comes from the model folder that --init names`)
  const { FineTune, guarded, LatentDataset, presets, Trainer, withNormalisation } = await import(
    '../train/index.ts'
  )
  const text = await textOf(s)
  const {
    loraRank: rank,
    loraAlpha: alpha,
    loraTargets: targets,
    variant,
    dtype,
    batchSize,
    steps,
    learningRate,
  } = s
  const tune = await FineTune.open(s.init as string, {
    ...{ dtype, variant, signal },
    text,
    ...(rank === undefined ? {} : { lora: { rank, alpha, targets, seed: s.seed } }),
  })
  const data = await LatentDataset.open(s.data)
  const validation = s.validation === undefined ? undefined : await LatentDataset.open(s.validation)
  const trainer = new Trainer({
    ...options,
    ...tune.parts(data, { steps, batchSize, learningRate, seed: s.seed }),
    ...(validation && { validation: withNormalisation(validation, tune.normalisation) }),
  })
  try {
    const run = (stop: AbortSignal) => trainer.run({ signal: stop, resume: s.resume })
    const guard = s.preset === 'one-clip' && validation ? presets.oneClip.guard : undefined
    if (s.preset === 'one-clip' && !guard)
      say('pyraflow: no --validation clips, so nothing ends the run when it forgets')
    const events = guard ? guarded(run, { ...guard, signal }) : run(signal)
    const done = await follow(events, s, mode)
    const folder = join(s.out, 'model')
    // That of the same run, when it was resumed.
    await rm(folder, { recursive: true, force: true })
    return { ...done, model: await tune.save(trainer, tune.lora ? s.out : folder, { signal }) }
  } finally {
    trainer.dispose()
    tune.dispose()
    data.dispose()
    validation?.dispose()
  }
}

/** The encoder or cache that was named, else the features that lie beside the latents, else what the model folder has. */
async function textOf({ textEncoder, textCache, data }: DitSettings) {
  const { WordEncoder } = await import('../text/word-encoder.ts')
  const { CachedTextEncoder } = await import('../train/text-cache.ts')
  if (textEncoder !== undefined) return WordEncoder.fromPretrained(textEncoder)
  const cache = textCache ?? join(data, TEXT_FOLDER)
  return textCache !== undefined || existsSync(cache) ? CachedTextEncoder.open(cache) : undefined
}
