import { existsSync } from 'node:fs'
import type { Command } from 'commander'
import { z } from 'zod'
import { type CommonOptions, interruptible, result, resultJson } from './console.ts'
import { makeProgress } from './progress.ts'
import { anyNumber, common, configureEngine, option, resolveSettings, wholeNumber } from './settings.ts'

const settings = z.strictObject({
  vae: z.string(),
  out: z.string(),
  width: z.int().positive(),
  height: z.int().positive(),
  frames: z.int().positive(),
  fps: z.number().positive().optional(),
  dtype: z.enum(['f32', 'bf16']).default('f32'),
})

interface EncodeFlags extends CommonOptions {
  config?: string
}

export function addEncode(program: Command): void {
  const command = program
    .command('encode')
    .description('encode clips and captions once, for training: a latent and caption cache')
    .argument('<data>', 'folder with captions.jsonl and clips, or the JSONL itself')
    .option('--config <file>', 'settings as JSON')
  option(command, '--vae <dir>', 'folder of the causal VAE')
  option(command, '--out <dir>', 'folder for the cache')
  option(command, '--width <px>', 'clips are scaled to cover this width and cropped', wholeNumber)
  option(command, '--height <px>', 'and this height', wholeNumber)
  option(command, '--frames <n>', 'frames of every clip, 1 + a multiple of 8', wholeNumber)
  option(command, '--fps <n>', 'resample clips to this rate', anyNumber)
  option(command, '--dtype <type>', 'compute type: f32 or bf16')
  common(command).action(run)
}

async function run(data: string, flags: EncodeFlags, command: Command): Promise<void> {
  const s = resolveSettings(settings, command, flags.config)
  await configureEngine(flags)
  const { CausalVideoVAE } = await import('../models/causal-vae.ts')
  const { encodeLatents } = await import('../train/latent-cache.ts')
  const { openDataset } = await import('../train/dataset.ts')
  const { signal, release } = interruptible()
  const progress = makeProgress(flags.progress)
  const began = performance.now()
  let count = 0
  try {
    const { width, height, frames, fps } = s
    const clips = await openDataset(data, { width, height, frames, ...(fps === undefined ? {} : { fps }) })
    count = clips.length
    const vae = await CausalVideoVAE.fromPretrained(s.vae, { dtype: s.dtype })
    try {
      await encodeLatents(vae, clips, s.out, {
        signal,
        onProgress: (done, total) => {
          const etaMs = ((performance.now() - began) / done) * (total - done)
          progress.update({ label: 'encoded', done, total, etaMs })
        },
      })
    } finally {
      vae.dispose()
    }
  } finally {
    progress.end()
    release()
  }
  const seconds = (performance.now() - began) / 1000
  if (flags.json) resultJson({ out: s.out, clips: count, seconds })
  else if (existsSync(s.out)) result(s.out)
}
