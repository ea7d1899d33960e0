import { cpSync } from 'node:fs'
import { join } from 'node:path'
import { type Command, Option } from 'commander'
import type { LatentSource } from '../train/latent-source.ts'
import type { AdamWOptions } from '../train/optimizer.ts'
import type { TrainerOptions } from '../train/trainer.ts'
import { type CommonOptions, interruptible, result, resultJson, say, UsageError } from './console.ts'
import { addFineTuneFlags, fineTune, goesOn } from './fine-tune.ts'
import {
  anyNumber,
  common,
  configureEngine,
  kebab,
  option,
  readSettings,
  resolveSettings,
  wholeNumber,
} from './settings.ts'
import { addObjectiveFlags, describeTrainingPlan, objectiveOptions, sayRehearsal } from './train-objective.ts'
import { type Done, follow } from './train-progress.ts'
import {
  checkNetwork,
  checkTogether,
  type DitSettings,
  type VaeSettings,
  vaeSettings,
  withPreset,
} from './train-settings.ts'

interface TrainFlags extends CommonOptions {
  config?: string
  task?: string
  dryRun?: boolean
  plan?: boolean
}

// Flags that are not settings of a task.
const OWN = ['config', 'dryRun', 'plan', 'json', 'progress', 'backend', 'threads']

export function addTrain(program: Command): void {
  const command = program
    .command('train')
    .description('train the velocity network on a latent cache, or a VAE on clips')
    .addOption(
      new Option('--task <name>', 'what to train (default: dit)')
        .choices(['dit', 'vae'])
        .env('PYRAFLOW_TASK'),
    )
    .option('--config <file>', 'settings as JSON; flags and PYRAFLOW_* variables go before it')
    .option('--dry-run', 'print the resolved settings and stop')
    .option('--plan', 'dit: print what a step takes (memory, operations, time) and stop; no weights are read')
  option(command, '--data <dir>', 'latent cache (dit; see encode), or clips with captions.jsonl (vae)')
  option(command, '--out <dir>', 'folder of the run: checkpoints, metrics.jsonl, the finished model')
  option(command, '--steps <n>', 'optimizer steps', wholeNumber)
  option(command, '--batch-size <n>', 'clips a step', wholeNumber)
  option(command, '--seed <n>', 'the same seed gives the same run', wholeNumber)
  option(command, '--dtype <type>', 'compute type: f32 or bf16; master weights are f32')
  option(command, '--init <dir>', 'weights to begin from; dit: or a whole model folder to go on from')
  option(command, '--learning-rate <n>', 'peak learning rate', anyNumber)
  option(command, '--min-learning-rate <n>', 'where cosine ends', anyNumber)
  option(command, '--warmup-steps <n>', 'steps of linear warm-up', wholeNumber)
  option(command, '--schedule <kind>', 'constant or cosine')
  option(command, '--checkpoint-every <n>', 'steps between checkpoints', wholeNumber)
  option(command, '--keep-checkpoints <n>', 'newest checkpoints kept, besides the best one', wholeNumber)
  option(command, '--accumulate <n>', 'micro-steps whose gradients are averaged into one step', wholeNumber)
  option(
    command,
    '--non-finite <policy>',
    'for a loss or gradient that is not finite: skip, rollback or fail',
  )
  option(command, '--max-loss <n>', 'skip the update of a step whose loss is this high', anyNumber)
  option(
    command,
    '--text-encoder <dir>',
    'dit: text encoder (default: one made from the words of the captions)',
  )
  option(command, '--text-cache <dir>', 'dit: text cache that encode made, instead of a text encoder')
  option(command, '--vae <dir>', 'dit: VAE to put into the finished model folder')
  option(command, '--validation <dir>', 'what is not trained on: a latent cache (dit) or clips (vae)')
  option(command, '--validate-every <n>', 'steps between validations', wholeNumber)
  option(
    command,
    '--sample-prompts <text>',
    'dit: prompt of a video to show while training (may be repeated)',
    (text: string, before: string[] | undefined) => [...(before ?? []), text],
  )
  option(
    command,
    '--sample-every <n>',
    'steps between such videos, or (vae) between grids of reconstructed clips',
    wholeNumber,
  )
  addObjectiveFlags(command)
  addFineTuneFlags(command)
  option(command, '--width <px>', 'vae: clips are scaled to cover this width and cropped', wholeNumber)
  option(command, '--height <px>', 'vae: and this height', wholeNumber)
  option(command, '--frames <n>', 'vae: frames of every clip', wholeNumber)
  option(command, '--fps <n>', 'vae: resample clips to this rate', anyNumber)
  option(command, '--lpips <file>', 'vae: safetensors of LPIPS, for the perceptual term')
  option(command, '--resume', 'continue from the newest checkpoint in --out')
  common(command).action(run)
}

async function run(flags: TrainFlags, command: Command): Promise<void> {
  const task =
    flags.task ?? (flags.config === undefined ? 'dit' : String(readSettings(flags.config).task ?? 'dit'))
  const setting = (name: string): unknown =>
    command.getOptionValue(name) ??
    (flags.config === undefined ? undefined : readSettings(flags.config)[name])
  const preset = setting('preset') as string | undefined
  const schema = task === 'vae' ? vaeSettings : withPreset(preset, setting('validation') !== undefined)
  for (const key of Object.keys(command.opts())) {
    if (OWN.includes(key) || key in schema.shape || command.getOptionValueSource(key) !== 'cli') continue
    throw new UsageError(`--${kebab(key)} is not a setting of task ${task}`)
  }
  const settings = resolveSettings(schema, command, flags.config)
  checkTogether(settings)
  const { networkDefaults } = await import('../models/load-network.ts')
  const { CAUSAL_VAE_DEFAULTS } = await import('../models/causal-vae.ts')
  checkNetwork(
    settings.network,
    task === 'vae' ? CAUSAL_VAE_DEFAULTS : networkDefaults(settings.network ?? {}),
  )
  if (flags.dryRun) return resultJson(settings)
  await configureEngine(flags)
  if (flags.plan) {
    if (settings.task === 'vae') throw new UsageError('--plan is for task dit')
    return await planDit(settings, flags)
  }
  const { signal, release } = interruptible()
  try {
    const done =
      settings.task === 'vae'
        ? await trainVae(settings, flags, signal)
        : await trainDit(settings, flags, signal)
    if (flags.json) resultJson(done)
    else result(done.model)
  } finally {
    release()
  }
}

/** The same object without the keys whose value is undefined. */
function defined<T extends object>(options: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as never
}

function trainerOptions(s: DitSettings | VaeSettings) {
  const { out, steps, batchSize, seed, learningRate, minLearningRate, warmupSteps, schedule } = s
  const { checkpointEvery, accumulate, keepCheckpoints, keepBest, nonFinite, maxLoss } = s
  const optimizer = s.optimizer && (defined(s.optimizer) as AdamWOptions)
  return defined({
    ...{ out, steps, batchSize, seed, learningRate, minLearningRate, warmupSteps, schedule },
    ...{ checkpointEvery, accumulate, keepCheckpoints, keepBest, nonFinite, maxLoss },
    optimizer,
  })
}

async function trainVae(s: VaeSettings, flags: TrainFlags, signal: AbortSignal): Promise<Done> {
  const { CausalVideoVAE, Generator, Lpips, PatchDiscriminator } = await import('../index.ts')
  const { openDataset, VaeTrainer } = await import('../train/index.ts')
  const { width, height, frames, fps } = s
  const size = defined({ width, height, frames, fps })
  const data = await openDataset(s.data, size)
  const validation = s.validation === undefined ? undefined : await openDataset(s.validation, size)
  const model = s.init
    ? await CausalVideoVAE.fromPretrained(s.init, { dtype: s.dtype, train: true })
    : CausalVideoVAE.create(s.network ?? {}, {
        generator: new Generator(s.seed).stream('vae'),
        dtype: s.dtype,
        train: true,
      })
  if (!s.lpips) say('pyraflow: no --lpips file, so training goes without the perceptual term')
  const lpips = s.lpips ? await Lpips.fromPretrained(s.lpips, { dtype: s.dtype }) : undefined
  const { dims, ndf, layers: n_layers, ...adversarial } = s.adversarial ?? {}
  const discriminator = s.adversarial
    ? PatchDiscriminator.create(defined({ dims, ndf, n_layers }), {
        generator: new Generator(s.seed).stream('discriminator'),
        dtype: s.dtype,
        train: true,
      })
    : undefined
  const trainer = new VaeTrainer({
    ...(trainerOptions(s) as ReturnType<typeof trainerOptions> & { out: string }),
    model,
    data,
    ...defined({ validation, validateEvery: s.validateEvery, validationClips: s.validationClips }),
    samples: defined({ every: s.sampleEvery, clips: s.sampleClips }),
    klWeight: s.klWeight,
    pixelWeight: s.pixelWeight,
    ...(s.crops ? { crops: s.crops } : {}),
    ...(lpips ? { perceptual: { model: lpips, weight: s.lpipsWeight } } : {}),
    ...(discriminator ? { adversarial: { discriminator, ...adversarial } } : {}),
  } as ConstructorParameters<typeof VaeTrainer>[0])
  try {
    const done = await follow(trainer.run({ signal, resume: s.resume }), s, flags.progress)
    const folder = join(s.out, 'model', 'causal_video_vae')
    await trainer.save(folder)
    return { ...done, model: folder }
  } finally {
    for (const made of [trainer, model, lpips, discriminator]) made?.dispose()
  }
}

/** What a step of these settings takes, before any weights are there. */
async function planDit(s: DitSettings, flags: TrainFlags): Promise<void> {
  const { makeStages, measureRates, WordEncoder } = await import('../index.ts')
  const { readConfig } = await import('../io/pretrained.ts')
  const { networkDefaults } = await import('../models/load-network.ts')
  const { LatentDataset, planTraining } = await import('../train/index.ts')
  const data = await LatentDataset.open(s.data)
  try {
    const network = s.init ? readConfig(s.init) : (s.network ?? {})
    const text = s.textEncoder
      ? WordEncoder.fromPretrained(s.textEncoder)
      : new WordEncoder(wordsOf(data.captions, { ...networkDefaults(network), ...network }))
    const { accumulate, optimizer } = trainerOptions(s)
    const plan = await planTraining({
      ...objectiveOptions(s),
      ...defined({ accumulate, optimizer }),
      ...{ network, dtype: s.dtype, batchSize: s.batchSize, text, rates: await measureRates(s.dtype) },
      stages: makeStages(defined(s.stages ?? {})),
      buckets: data.buckets.map(({ shape, indices }) => ({ shape, clips: indices.length })),
    })
    if (flags.json) resultJson(plan)
    else for (const line of describeTrainingPlan(plan)) result(line)
  } finally {
    data.dispose()
  }
}

/** The options that settings give, whatever the network begins from. */
function ditOptions(s: DitSettings) {
  const { validateEvery, validationClips, samplePrompts: prompts, sampleEvery: every, vae } = s
  const samples = prompts && { ...defined(s.sampleOptions ?? {}), prompts, every, vae }
  return {
    ...trainerOptions(s),
    ...objectiveOptions(s),
    ...defined({ validateEvery, validationClips, samples }),
  } as Omit<TrainerOptions, 'model' | 'data' | 'text'>
}

async function trainDit(s: DitSettings, flags: TrainFlags, signal: AbortSignal): Promise<Done> {
  if (goesOn(s)) return fineTune(s, ditOptions(s), flags.progress, signal)
  const { makeStages, WordEncoder } = await import('../index.ts')
  const { createVelocityNetwork, loadVelocityNetwork } = await import('../models/load-network.ts')
  const { CachedTextEncoder, LatentDataset, Trainer } = await import('../train/index.ts')
  if (s.textCache !== undefined && s.textEncoder !== undefined) {
    throw new UsageError('give either --text-encoder or --text-cache')
  }
  const data = await LatentDataset.open(s.data)
  const validation = s.validation === undefined ? undefined : await LatentDataset.open(s.validation)
  const model = s.init
    ? await loadVelocityNetwork(s.init, { dtype: s.dtype, train: true })
    : createVelocityNetwork(s.network ?? {}, { seed: s.seed, dtype: s.dtype, train: true })
  const captions = [...data.captions, ...(validation?.captions ?? [])]
  const text = s.textCache
    ? await CachedTextEncoder.open(s.textCache)
    : s.textEncoder
      ? WordEncoder.fromPretrained(s.textEncoder)
      : new WordEncoder(wordsOf(captions, model.config))
  const trainer = new Trainer({
    ...ditOptions(s),
    ...defined({ validation }),
    stages: makeStages(defined(s.stages ?? {})),
    model,
    data,
    text,
  } as ConstructorParameters<typeof Trainer>[0])
  try {
    if (s.rehearse) sayRehearsal(await trainer.rehearse({ signal }))
    const done = await follow(trainer.run({ signal, resume: s.resume }), s, flags.progress)
    const folder = join(s.out, 'model')
    await trainer.save(join(folder, 'diffusion_transformer'))
    if (text instanceof WordEncoder) await text.save(join(folder, 'text_encoder'))
    else say(`pyraflow: ${folder} has no text encoder: copy those that made ${s.textCache} into it`)
    await writePipelineConfig(folder, s, data, trainer.stages.count)
    return { ...done, model: folder }
  } finally {
    trainer.dispose()
    model.dispose()
    data.dispose()
    validation?.dispose()
    if (text instanceof CachedTextEncoder) text.dispose()
  }
}

/** A closed vocabulary of the words that occur, long enough for the longest caption and its end mark. */
function wordsOf(
  captions: readonly string[],
  config: { joint_attention_dim: number; pooled_projection_dim: number },
) {
  if (config.joint_attention_dim !== config.pooled_projection_dim) {
    throw new UsageError(
      'network.joint_attention_dim and network.pooled_projection_dim must be equal for a text encoder made from captions; ' +
        'or give --text-encoder',
    )
  }
  const lines = captions.map((caption) => caption.toLowerCase().match(/[a-z0-9]+/g) ?? [])
  const longest = lines.reduce((n, words) => Math.max(n, words.length), 0)
  return {
    vocabulary: [...new Set(lines.flat())].sort(),
    dim: config.joint_attention_dim,
    maxLength: Math.ceil((longest + 1) / 4) * 4,
    seed: 7,
  }
}

/** What `generate` needs to know besides weights; with a VAE the folder is complete. */
async function writePipelineConfig(
  folder: string,
  s: DitSettings,
  data: Pick<LatentSource, 'normalisation' | 'buckets'>,
  stageCount: number,
): Promise<void> {
  const { writeFileAtomically } = await import('../io/atomic.ts')
  const frames = Math.max(...data.buckets.map(({ shape }) => shape[1] as number))
  const sizes = new Map(data.buckets.map(({ shape: [, , h, w] }) => [`${w}×${h}`, [w, h] as number[]]))
  const steps = (n: number): number[] => new Array<number>(stageCount).fill(n)
  const config: Record<string, unknown> = {
    normalisation: data.normalisation,
    stages: defined(s.stages ?? {}),
    framesPerUnit: s.framesPerUnit,
    steps: steps(10),
    videoSteps: steps(8),
  }
  if (s.vae) {
    const { CausalVideoVAE } = await import('../index.ts')
    const vae = await CausalVideoVAE.fromPretrained(s.vae)
    config.sizes = [...sizes.values()].map((size) => size.map((n) => n * vae.spatialFactor))
    config.seconds = ((frames - 1) * vae.temporalFactor) / 24
    vae.dispose()
    cpSync(s.vae, join(folder, 'causal_video_vae'), { recursive: true })
  }
  await writeFileAtomically(join(folder, 'pyraflow.json'), `${JSON.stringify(config, null, 2)}\n`)
}
