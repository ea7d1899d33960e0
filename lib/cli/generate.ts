import { extname, join } from 'node:path'
import type { Command } from 'commander'
import { z } from 'zod'
import type { GenerateEvent } from '../generate/generation.ts'
import type { GenerateOptions } from '../generate/options.ts'
import type { Recipe } from '../generate/recipe.ts'
import { type CommonOptions, interruptible, paint, result, resultJson, say, UsageError } from './console.ts'
import { duration, makeProgress } from './progress.ts'
import {
  adapterChoice,
  anyNumber,
  common,
  configureEngine,
  gather,
  historyOptions,
  numberList,
  option,
  resolveSettings,
  wholeNumber,
} from './settings.ts'

const perStage = z.union([z.int().positive(), z.array(z.int().positive())])

const settings = z.strictObject({
  model: z.string(),
  prompt: z.union([z.string(), z.array(z.string()).nonempty()]).optional(),
  promptChanges: z.array(z.strictObject({ from: z.number().nonnegative(), prompt: z.string() })).optional(),
  negativePrompt: z.string().optional(),
  out: z.string().default('video.webp'),
  recipe: z.string().optional(),
  image: z.string().optional(),
  continueFrom: z.string().optional(),
  videosPerPrompt: z.int().positive().optional(),
  width: z.int().positive().optional(),
  height: z.int().positive().optional(),
  seconds: z.number().positive().optional(),
  frames: z.int().positive().optional(),
  seed: z.int().nonnegative().optional(),
  steps: perStage.optional(),
  videoSteps: perStage.optional(),
  guidanceScale: z.number().optional(),
  videoGuidanceScale: z.number().optional(),
  guidance: z.array(z.number()).nonempty().optional(),
  linearGuidance: z.strictObject({ alpha: z.number().optional(), min: z.number().optional() }).optional(),
  guidanceStop: z.number().min(0).max(1).optional(),
  historyCache: z.int().positive().optional(),
  historyWindow: z.int().positive().optional(),
  preview: z.string().optional(),
  latents: z.boolean().optional(),
  resume: z.string().optional(),
  allowUntrained: z.boolean().optional(),
  adapters: z.array(z.strictObject({ path: z.string(), scale: z.number().optional() })).optional(),
  maxMemory: z.number().positive().optional(),
  dtype: z.enum(['f32', 'bf16']).default('f32'),
  quantize: z.enum(['int8']).optional(),
  variant: z.string().optional(),
})

// Checked before a model is loaded, not after minutes of computing.
const ENDINGS = ['.mp4', '.webm', '.webp', '.gif', '.png', '']

interface GenerateFlags extends CommonOptions {
  config?: string
  dryRun?: boolean
}

export function addGenerate(program: Command): void {
  const command = program
    .command('generate')
    .description('generate videos (or images) from prompts')
    .option('--config <file>', 'settings as JSON, named as these options in camelCase')
    .option('--dry-run', 'print the resolved settings and stop')
  option(command, '--model <dir>', 'folder with causal_video_vae, diffusion_transformer…, text_encoder')
  // Flags that are given again gather in a list.
  option(
    command,
    '--prompt <text>',
    'what to show; several for a batch',
    gather((text) => text),
  )
  option(
    command,
    '--from <seconds:text>',
    'another prompt from a time on, e.g. "3:it snows"',
    gather(promptChange),
  )
  option(command, '--negative-prompt <text>', 'what to avoid')
  option(
    command,
    '--out <file>',
    '.mp4, .webm, .webp, .gif, or a folder for .png frames (default: video.webp)',
  )
  option(command, '--recipe <file>', 'make a saved video again; other options replace its own')
  option(command, '--image <file>', 'first frame to continue from')
  option(command, '--continue-from <file>', 'video or .latents.safetensors to continue')
  option(
    command,
    '--videos-per-prompt <n>',
    'videos of each prompt, with seeds one after another',
    wholeNumber,
  )
  option(command, '--width <px>', 'width', wholeNumber)
  option(command, '--height <px>', 'height', wholeNumber)
  option(command, '--seconds <n>', 'length in seconds; when continuing, how much longer', anyNumber)
  option(command, '--frames <n>', 'or at least this many frames; 1 is an image', wholeNumber)
  option(command, '--seed <n>', 'the same seed gives the same video', wholeNumber)
  option(command, '--steps <list>', 'steps per stage of the first unit, e.g. 20,20,20', numberList)
  option(command, '--video-steps <list>', 'steps per stage of later units, e.g. 10,10,10', numberList)
  option(command, '--guidance-scale <n>', 'how strongly the first unit follows the prompt', anyNumber)
  option(command, '--video-guidance-scale <n>', 'and later units', anyNumber)
  option(command, '--guidance <list>', 'or one number a unit, the last of which holds on', scales)
  option(command, '--linear-guidance <alpha,min>', 'or falling by alpha a unit down to min', falling)
  option(
    command,
    '--guidance-stop <share>',
    'share of the steps after which guidance ends, e.g. 0.67',
    anyNumber,
  )
  historyOptions(command)
  option(command, '--preview <dir>', 'write small pictures of what is being made into this folder')
  command.option('--latents', 'also write .latents.safetensors, to continue from without loss')
  option(command, '--resume <dir>', 'keep finished units here; the same command again goes on behind them')
  option(command, '--max-memory <bytes>', 'most that weights and work together may take', anyNumber)
  option(command, '--dtype <type>', 'compute type: f32 or bf16')
  option(command, '--quantize <type>', 'int8: products of tokens in eight bits, where the CPU has them')
  option(command, '--lora <file[:scale]>', 'adapter to add; several may be given', gather(adapterChoice))
  option(command, '--variant <name>', 'folder of the transformer when there are several')
  option(command, '--allow-untrained', 'accept sizes the model was not trained for')
  common(command).action(run)
}

async function run(flags: GenerateFlags, command: Command): Promise<void> {
  const { model, out, dtype, quantize, variant, maxMemory, recipe, preview, latents, ...request } =
    resolveSettings(settings, command, flags.config, { from: 'promptChanges', lora: 'adapters' })
  if (request.prompt === undefined && recipe === undefined) throw new UsageError('missing --prompt')
  if (!ENDINGS.includes(extname(out).toLowerCase())) {
    throw new UsageError(
      `--out: expected a name ending in ${ENDINGS.filter(Boolean).join(', ')}, or a folder, but received ${out}`,
    )
  }
  await configureEngine(flags)
  const { engine } = await import('../engine/engine.ts')
  const { Pipeline } = await import('../pipeline.ts')
  const { readRecipe } = await import('../generate/recipe.ts')
  const { signal, release } = interruptible()
  const progress = makeProgress(flags.progress)
  const began = performance.now()
  const base = recipe === undefined ? {} : await readRecipe(recipe)
  const pipeline = await Pipeline.load(model, { dtype, ...defined({ quantize, variant, maxMemory }) })
  try {
    const options: GenerateOptions = {
      ...base,
      ...defined(request),
      previews: preview !== undefined,
      signal,
    }
    if (request.seconds !== undefined) delete options.frames
    if (flags.dryRun) {
      const plan = await pipeline.plan(options)
      return resultJson({ model, out, ...pipeline.resolve(options), plan })
    }
    const generation = pipeline.generate(options)
    for await (const event of generation) {
      if (event.type === 'progress') {
        const { phase, done, total, unit, stage, etaMs } = event
        progress.update({ label: phase, done, total, detail: `unit ${unit}, stage ${stage}`, etaMs })
      } else if (event.type === 'warning') {
        progress.end()
        say(`${paint('warning:', 'yellow')} ${event.message}`)
      } else if (event.type === 'preview' && preview !== undefined) await savePreview(preview, event)
    }
    progress.end()
    const files = await generation.save(out, { latents })
    const recipes = (await generation.results()).map((video) => video.recipe)
    const seconds = (performance.now() - began) / 1000
    const { device } = engine
    if (flags.json) {
      const videos = files.map((file, i) => ({ out: file, recipe: recipes[i] }))
      resultJson({ ...videos[0], ...(files.length > 1 ? { videos } : {}), seconds, device })
      return
    }
    const [first] = recipes as [Recipe]
    say(`${first.frames} frames, seed ${first.seed}, ${duration(seconds * 1000)}`)
    for (const file of files) result(file)
  } finally {
    progress.end()
    release()
    pipeline.dispose()
  }
}

async function savePreview(
  folder: string,
  event: Extract<GenerateEvent, { type: 'preview' }>,
): Promise<void> {
  const { savePng } = await import('../io/image.ts')
  const { video, unit, stage, width, height, frames, count } = event
  // The last frame is what the unit leads to.
  const last = frames.subarray((count - 1) * width * height * 3)
  await savePng(join(folder, `video-${video}-unit-${unit}-stage-${stage}.png`), last, { width, height })
}

function promptChange(text: string): { from: number; prompt: string } {
  const [, from = '', prompt = ''] = /^([^:]*):(.*)$/s.exec(text) ?? []
  return { from: anyNumber(from), prompt: prompt.trim() }
}

const scales = (text: string): number[] => text.split(',').map(anyNumber)

function falling(text: string): { alpha?: number; min?: number } {
  const [alpha, min] = scales(text)
  return { ...(alpha === undefined ? {} : { alpha }), ...(min === undefined ? {} : { min }) }
}

// Options that were not given must be absent, not undefined.
function defined<T extends object>(options: T): T {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as T
}
