import type { Command } from 'commander'
import { z } from 'zod'
import type { Plan } from '../plan.ts'
import { type CommonOptions, result, resultJson } from './console.ts'
import { duration } from './progress.ts'
import {
  anyNumber,
  common,
  configureEngine,
  historyOptions,
  numberList,
  option,
  resolveSettings,
  wholeNumber,
} from './settings.ts'

const settings = z.strictObject({
  model: z.string(),
  width: z.int().positive().optional(),
  height: z.int().positive().optional(),
  seconds: z.number().positive().optional(),
  frames: z.int().positive().optional(),
  steps: z.array(z.int().positive()).optional(),
  videoSteps: z.array(z.int().positive()).optional(),
  guidanceScale: z.number().optional(),
  videoGuidanceScale: z.number().optional(),
  guidanceStop: z.number().min(0).max(1).optional(),
  historyCache: z.int().positive().optional(),
  historyWindow: z.int().positive().optional(),
  allowUntrained: z.boolean().optional(),
  maxMemory: z.number().positive().optional(),
  dtype: z.enum(['f32', 'bf16']).default('f32'),
  quantize: z.enum(['int8']).optional(),
  variant: z.string().optional(),
  time: z.boolean().optional(),
})

export function addPlan(program: Command): void {
  const command = program
    .command('plan')
    .description('what a video would take: tokens, operations, memory by phase; nothing is loaded')
  option(command, '--model <dir>', 'folder with causal_video_vae, diffusion_transformer…, text_encoder')
  option(command, '--width <px>', 'width', wholeNumber)
  option(command, '--height <px>', 'height', wholeNumber)
  option(command, '--seconds <n>', 'length in seconds', anyNumber)
  option(command, '--frames <n>', 'or at least this many frames', wholeNumber)
  option(command, '--steps <list>', 'steps per stage of the first unit, e.g. 20,20,20', numberList)
  option(command, '--video-steps <list>', 'steps per stage of later units, e.g. 10,10,10', numberList)
  option(command, '--guidance-scale <n>', '0: no guidance, and half the work', anyNumber)
  option(command, '--video-guidance-scale <n>', 'and later units', anyNumber)
  option(command, '--guidance-stop <share>', 'share of the steps after which guidance ends', anyNumber)
  historyOptions(command)
  option(command, '--dtype <type>', 'compute type: f32 or bf16')
  option(command, '--quantize <type>', 'int8: products of tokens in eight bits, where the CPU has them')
  option(command, '--variant <name>', 'folder of the transformer when there are several')
  option(command, '--max-memory <bytes>', 'a limit that decoding and weights are made to fit', anyNumber)
  option(command, '--allow-untrained', 'accept sizes the model was not trained for')
  option(command, '--time', 'measure this machine for half a second and estimate how long it takes')
  common(command).action(run)
}

async function run(flags: CommonOptions, command: Command): Promise<void> {
  const { model, time, ...rest } = resolveSettings(settings, command)
  await configureEngine(flags)
  const { planFolder } = await import('../plan-folder.ts')
  const { measureRates } = await import('../plan-seconds.ts')
  const rates = time ? await measureRates(rest.dtype, rest.quantize) : undefined
  const given = Object.fromEntries(Object.entries(rest).filter(([, value]) => value !== undefined))
  const plan = await planFolder(model, { ...given, ...(rates && { rates }) })
  if (flags.json) resultJson(plan)
  else for (const line of describePlan(plan)) result(line)
}

/** A plan in lines for people. */
export function describePlan(plan: Plan): string[] {
  const { bytes, flops, seconds, pieces, tokens, offloaded } = plan
  const gib = (n: number): string => `${(n / 2 ** 30).toFixed(2)} GiB`
  const tera = (n: number): string => `${(n / 1e12).toFixed(1)} TFLOP`
  const most = Math.max(...tokens.map(({ total }) => total))
  const time = (n: number | undefined): string => (n === undefined ? '' : `, about ${duration(1000 * n)}`)
  const { transformer, vae, text } = bytes.weights
  const again = offloaded > 0 ? `; ${gib(offloaded)} are read again for every step` : ''
  const cut = [
    pieces.tile === null ? '' : `tiles of ${pieces.tile} px`,
    pieces.window === null ? '' : `${pieces.window} latent frames at once`,
  ].filter(Boolean)
  return [
    `video     ${plan.frames} frames of ${plan.width}×${plan.height}, ${plan.dtype}${plan.quantize ? ` with products in ${plan.quantize}` : ''}`,
    `weights   ${gib(transformer + vae + text)} (transformer ${gib(transformer)}, VAE ${gib(vae)}, text ${gib(text)})${again}`,
    `text      ${gib(bytes.text)}, ${tera(flops.text)}${time(seconds?.text)}`,
    `denoise   ${gib(bytes.denoise)}, ${tera(flops.denoise)}${time(seconds?.denoise)}; at most ${most} tokens a step`,
    `decode    ${gib(bytes.decode)}, ${tera(flops.decode)}${time(seconds?.decode)}${cut.length > 0 ? `; in ${cut.join(' and ')}` : ''}`,
    `in all    ${gib(bytes.peak)}, ${tera(flops.total)}${time(seconds?.total)}`,
  ]
}
