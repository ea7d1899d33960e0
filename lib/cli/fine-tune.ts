import { existsSync } from 'node:fs'
import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import type { TrainerOptions } from '../train/trainer.ts'
import { type ProgressMode, say, UsageError } from './console.ts'
import { TEXT_FOLDER } from './encode.ts'
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

/** Trains the transformer of a whole model folder, or adapters for it. */
export async function fineTune(
  s: DitSettings & { init?: string },
  options: Omit<TrainerOptions, 'model' | 'data' | 'text' | 'stages' | 'framesPerUnit'>,
  mode: ProgressMode | undefined,
  signal: AbortSignal,
): Promise<Done> {
  for (const name of ['stages', 'network'] as const)
    if (s[name]) throw new UsageError(`"${name}" comes from the model folder that --init names`)
  const { FineTune, guarded, LatentDataset, presets, repeated, Trainer, withNormalisation } = await import(
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
  const small = s.preset !== undefined && data.length < batchSize
  const source = small ? repeated(data, Math.ceil(batchSize / data.length)) : data
  const trainer = new Trainer({
    ...options,
    ...tune.parts(source, { steps, batchSize, learningRate, seed: s.seed }),
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

/** The encoder of `--text-encoder`, else the features that lie beside the latents, else what the model folder has. */
async function textOf({ textEncoder, data }: DitSettings) {
  const { WordEncoder } = await import('../text/word-encoder.ts')
  const { CachedTextEncoder } = await import('../train/text-cache.ts')
  const cache = join(data, TEXT_FOLDER)
  if (textEncoder !== undefined) return WordEncoder.fromPretrained(textEncoder)
  return existsSync(cache) ? CachedTextEncoder.open(cache) : undefined
}
