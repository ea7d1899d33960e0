import { cpSync } from 'node:fs'
import { join } from 'node:path'
import { type Command, Option } from 'commander'
import { z } from 'zod'
import { nearestName } from '../nn/weights.ts'
import type { AdamWOptions } from '../train/optimizer.ts'
import { type CommonOptions, interruptible, result, resultJson, say, UsageError } from './console.ts'
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
import { type Done, follow } from './train-progress.ts'

const positive = z.int().positive()
const share = z.number().min(0).max(1)
const weight = z.number().nonnegative()

const policy = z.enum(['skip', 'rollback', 'fail'])

const optimizer = z
  .strictObject({
    betas: z.tuple([share, share]).optional(),
    eps: z.number().positive().optional(),
    weightDecay: z.number().nonnegative().optional(),
    maxGradNorm: z.number().nonnegative().optional(),
    emaDecay: share.optional(),
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
}

/** Settings of `train` for the velocity network. */
const ditSettings = z.strictObject({
  task: z.literal('dit').default('dit'),
  ...shared,
  textEncoder: z.string().optional(),
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
  /** Latent cache of clips that are not trained on. */
  validation: z.string().optional(),
  validateEvery: positive.optional(),
  /** Videos to look at while training; they need `vae`. */
  samplePrompts: z.array(z.string()).min(1).optional(),
  sampleEvery: positive.optional(),
})

/** Settings of `train --task vae`. */
const vaeSettings = z.strictObject({
  task: z.literal('vae'),
  ...shared,
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

type DitSettings = z.output<typeof ditSettings>
type VaeSettings = z.output<typeof vaeSettings>

/** @throws UsageError naming a field that no network has, and the nearest one that it has. */
function checkNetwork(network: Record<string, unknown> | undefined, defaults: object): void {
  const fields = Object.keys(defaults)
  for (const key of Object.keys(network ?? {})) {
    if (fields.includes(key) || key === '_class_name') continue
    throw new UsageError(`unknown setting "network.${key}"; did you mean "${nearestName(key, fields)}"?`)
  }
}

/** @throws UsageError for settings of which one means nothing without the other. */
function checkTogether(s: DitSettings): void {
  const pairs: [keyof DitSettings, keyof DitSettings][] = [
    ['validateEvery', 'validation'],
    ['validation', 'validateEvery'],
    ['sampleEvery', 'samplePrompts'],
    ['samplePrompts', 'sampleEvery'],
    ['samplePrompts', 'vae'],
  ]
  for (const [given, missing] of pairs) {
    if (s[given] !== undefined && s[missing] === undefined)
      throw new UsageError(`--${kebab(given)} needs --${kebab(missing)}`)
  }
}

interface TrainFlags extends CommonOptions {
  config?: string
  task?: string
  dryRun?: boolean
}

// Flags that are not settings of a task.
const OWN = ['config', 'dryRun', 'json', 'progress', 'backend', 'threads']

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
  option(command, '--data <dir>', 'latent cache (dit; see encode), or clips with captions.jsonl (vae)')
  option(command, '--out <dir>', 'folder of the run: checkpoints, metrics.jsonl, the finished model')
  option(command, '--steps <n>', 'optimizer steps', wholeNumber)
  option(command, '--batch-size <n>', 'clips a step', wholeNumber)
  option(command, '--seed <n>', 'the same seed gives the same run', wholeNumber)
  option(command, '--dtype <type>', 'compute type: f32 or bf16; master weights are f32')
  option(command, '--init <dir>', 'folder of weights to begin from')
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
  option(command, '--vae <dir>', 'dit: VAE to put into the finished model folder')
  option(command, '--validation <dir>', 'dit: latent cache of clips that are not trained on')
  option(command, '--validate-every <n>', 'dit: steps between validations', wholeNumber)
  option(
    command,
    '--sample-prompts <text>',
    'dit: prompt of a video to show while training (may be repeated)',
    (text: string, before: string[] | undefined) => [...(before ?? []), text],
  )
  option(command, '--sample-every <n>', 'dit: steps between such videos', wholeNumber)
  option(command, '--caption-drop <share>', 'dit: share of captions replaced by none', anyNumber)
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
  const schema = task === 'vae' ? vaeSettings : ditSettings
  for (const key of Object.keys(command.opts())) {
    if (OWN.includes(key) || key in schema.shape || command.getOptionValueSource(key) !== 'cli') continue
    throw new UsageError(`--${kebab(key)} is not a setting of task ${task}`)
  }
  const settings = resolveSettings(schema, command, flags.config)
  if (settings.task === 'dit') checkTogether(settings)
  const { networkDefaults } = await import('../models/load-network.ts')
  const { CAUSAL_VAE_DEFAULTS } = await import('../models/causal-vae.ts')
  checkNetwork(
    settings.network,
    task === 'vae' ? CAUSAL_VAE_DEFAULTS : networkDefaults(settings.network ?? {}),
  )
  if (flags.dryRun) return resultJson(settings)
  await configureEngine(flags)
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
  const data = await openDataset(s.data, defined({ width, height, frames, fps }))
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

async function trainDit(s: DitSettings, flags: TrainFlags, signal: AbortSignal): Promise<Done> {
  const { makeStages, WordEncoder } = await import('../index.ts')
  const { createVelocityNetwork, loadVelocityNetwork } = await import('../models/load-network.ts')
  const { LatentDataset, Trainer } = await import('../train/index.ts')
  const data = await LatentDataset.open(s.data)
  const model = s.init
    ? await loadVelocityNetwork(s.init, { dtype: s.dtype, train: true })
    : createVelocityNetwork(s.network ?? {}, { seed: s.seed, dtype: s.dtype, train: true })
  const text = s.textEncoder
    ? WordEncoder.fromPretrained(s.textEncoder)
    : new WordEncoder(wordsOf(data.captions, model.config))
  const validation = s.validation === undefined ? undefined : await LatentDataset.open(s.validation)
  const { framesPerUnit, corruptRatio, captionDrop, sampleRatios, posterior, imageRatio, validateEvery } = s
  const trainer = new Trainer({
    ...trainerOptions(s),
    ...defined({ framesPerUnit, corruptRatio, captionDrop, sampleRatios, posterior, imageRatio }),
    ...defined({ validation, validateEvery }),
    ...(s.samplePrompts ? { samples: { prompts: s.samplePrompts, every: s.sampleEvery, vae: s.vae } } : {}),
    stages: makeStages(defined(s.stages ?? {})),
    model,
    data,
    text,
  } as ConstructorParameters<typeof Trainer>[0])
  try {
    const done = await follow(trainer.run({ signal, resume: s.resume }), s, flags.progress)
    const folder = join(s.out, 'model')
    await trainer.save(join(folder, 'diffusion_transformer'))
    await text.save(join(folder, 'text_encoder'))
    await writePipelineConfig(folder, s, data, trainer.stages.count)
    return { ...done, model: folder }
  } finally {
    trainer.dispose()
    model.dispose()
    data.dispose()
    validation?.dispose()
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
  data: { readonly normalisation: object; readonly shape: readonly number[] },
  stageCount: number,
): Promise<void> {
  const { writeFileAtomically } = await import('../io/atomic.ts')
  const [, frames, height, width] = data.shape as [number, number, number, number]
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
    config.sizes = [[width * vae.spatialFactor, height * vae.spatialFactor]]
    config.seconds = ((frames - 1) * vae.temporalFactor) / 24
    vae.dispose()
    cpSync(s.vae, join(folder, 'causal_video_vae'), { recursive: true })
  }
  await writeFileAtomically(join(folder, 'pyraflow.json'), `${JSON.stringify(config, null, 2)}\n`)
}
