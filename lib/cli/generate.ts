import { extname } from 'node:path'
import type { Command } from 'commander'
import { z } from 'zod'
import { type CommonOptions, interruptible, result, resultJson, say, UsageError } from './console.ts'
import { duration, makeProgress } from './progress.ts'
import {
  anyNumber,
  common,
  configureEngine,
  numberList,
  option,
  resolveSettings,
  wholeNumber,
} from './settings.ts'

const settings = z.strictObject({
  model: z.string(),
  prompt: z.string(),
  negativePrompt: z.string().optional(),
  out: z.string().default('video.webp'),
  image: z.string().optional(),
  width: z.int().positive().optional(),
  height: z.int().positive().optional(),
  seconds: z.number().positive().optional(),
  frames: z.int().positive().optional(),
  seed: z.int().nonnegative().optional(),
  steps: z.array(z.int().positive()).optional(),
  videoSteps: z.array(z.int().positive()).optional(),
  guidanceScale: z.number().optional(),
  videoGuidanceScale: z.number().optional(),
  allowUntrained: z.boolean().optional(),
  dtype: z.enum(['f32', 'bf16']).default('f32'),
  variant: z.string().optional(),
})

// Checked before a model is loaded, not after minutes of computing.
const ENDINGS = ['.mp4', '.webp', '.gif', '.png', '']

interface GenerateFlags extends CommonOptions {
  config?: string
  dryRun?: boolean
}

export function addGenerate(program: Command): void {
  const command = program
    .command('generate')
    .description('generate a video (or an image) from a prompt')
    .option('--config <file>', 'settings as JSON, named as these options in camelCase')
    .option('--dry-run', 'print the resolved settings and stop')
  option(command, '--model <dir>', 'folder with causal_video_vae, diffusion_transformer…, text_encoder')
  option(command, '--prompt <text>', 'what to show')
  option(command, '--negative-prompt <text>', 'what to avoid')
  option(command, '--out <file>', '.webp, .gif, .mp4, or a folder for .png frames (default: video.webp)')
  option(command, '--image <file>', 'first frame to continue from')
  option(command, '--width <px>', 'width', wholeNumber)
  option(command, '--height <px>', 'height', wholeNumber)
  option(command, '--seconds <n>', 'length in seconds', anyNumber)
  option(command, '--frames <n>', 'or at least this many frames', wholeNumber)
  option(command, '--seed <n>', 'the same seed gives the same video', wholeNumber)
  option(command, '--steps <list>', 'steps per stage of the first unit, e.g. 20,20,20', numberList)
  option(command, '--video-steps <list>', 'steps per stage of later units, e.g. 10,10,10', numberList)
  option(command, '--guidance-scale <n>', 'how strongly the first unit follows the prompt', anyNumber)
  option(command, '--video-guidance-scale <n>', 'and later units', anyNumber)
  option(command, '--dtype <type>', 'compute type: f32 or bf16')
  option(command, '--variant <name>', 'folder of the transformer when there are several')
  option(command, '--allow-untrained', 'accept sizes the model was not trained for')
  common(command).action(run)
}

async function run(flags: GenerateFlags, command: Command): Promise<void> {
  const { model, out, dtype, variant, ...request } = resolveSettings(settings, command, flags.config)
  if (!ENDINGS.includes(extname(out).toLowerCase())) {
    throw new UsageError(
      `--out: expected a name ending in ${ENDINGS.filter(Boolean).join(', ')}, or a folder, but received ${out}`,
    )
  }
  await configureEngine(flags)
  const { engine } = await import('../engine/engine.ts')
  const { Pipeline } = await import('../pipeline.ts')
  const { signal, release } = interruptible()
  const progress = makeProgress(flags.progress)
  const began = performance.now()
  const pipeline = await Pipeline.load(model, { dtype, ...(variant === undefined ? {} : { variant }) })
  try {
    const options = { ...defined(request), signal } as Parameters<typeof pipeline.generate>[0]
    const recipe = pipeline.resolve(options)
    if (flags.dryRun) return resultJson({ model, out, ...recipe })
    const generation = pipeline.generate(options)
    for await (const event of generation) {
      if (event.type !== 'progress') continue
      const { phase, done, total, unit, stage, etaMs } = event
      progress.update({ label: phase, done, total, detail: `unit ${unit}, stage ${stage}`, etaMs })
    }
    progress.end()
    await generation.save(out)
    const seconds = (performance.now() - began) / 1000
    if (flags.json) resultJson({ out, recipe, seconds, device: engine.device })
    else {
      say(`${recipe.frames} frames, seed ${recipe.seed}, ${duration(seconds * 1000)}`)
      result(out)
    }
  } finally {
    progress.end()
    release()
    pipeline.dispose()
  }
}

// Options that were not given must be absent, not undefined.
function defined<T extends object>(options: T): T {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as T
}
