import { join } from 'node:path'
import type { Command } from 'commander'
import { z } from 'zod'
import type { EncodedLatents } from '../train/latent-cache.ts'
import type { EncodedTexts } from '../train/text-cache.ts'
import { type CommonOptions, interruptible, paint, result, resultJson, say, UsageError } from './console.ts'
import { addDataOptions, bucketsIn, dataFlags, dataSettings, onBadFlag } from './data-settings.ts'
import { makeProgress } from './progress.ts'
import { anyNumber, common, configureEngine, option, resolveSettings } from './settings.ts'

const settings = z.strictObject({
  vae: z.string(),
  out: z.string(),
  textEncoder: z.string().optional(),
  ...dataSettings,
  onBad: z
    .union([z.enum(['fail', 'skip']), z.strictObject({ limit: z.int().nonnegative() })])
    .default('fail'),
  maxMemory: z.number().positive().optional(),
})
type Settings = z.output<typeof settings>

/** Where the text cache lies in the folder of a latent cache. */
export const TEXT_FOLDER = 'text'

interface EncodeFlags extends CommonOptions {
  config?: string
}

export function addEncode(program: Command): void {
  const command = program
    .command('encode')
    .description('encode clips and captions once, for training: a latent cache and, if asked, a text cache')
    .argument('<data>', 'folder with captions.jsonl and clips, or the JSONL itself')
    .option('--config <file>', 'settings as JSON')
  option(command, '--vae <dir>', 'folder of the causal VAE')
  option(command, '--out <dir>', 'folder for the cache; what is in it is used where it fits')
  option(command, '--text-encoder <dir>', 'model folder: encode the captions too, into <out>/text')
  addDataOptions(command)
  option(
    command,
    '--on-bad <policy>',
    'unusable entries: fail (default), skip, or how many to skip',
    onBadFlag,
  )
  option(command, '--max-memory <bytes>', 'a limit that encoding is cut to fit', anyNumber)
  common(command).action(run)
}

async function run(data: string, flags: EncodeFlags, command: Command): Promise<void> {
  const s = resolveSettings(settings, command, flags.config, dataFlags)
  const buckets = bucketsIn(s)
  if (!buckets) throw new UsageError('missing --width, --height and --frames, or --bucket')
  await configureEngine(flags)
  const { signal, release } = interruptible()
  const progress = makeProgress(flags.progress)
  const began = performance.now()
  const show = (label: string) => {
    const since = performance.now()
    return (done: number, total: number): void => {
      const etaMs = ((performance.now() - since) / done) * (total - done)
      progress.update({ label, done, total, etaMs })
    }
  }
  let latents: EncodedLatents
  let texts: EncodedTexts | undefined
  try {
    latents = await encodeClips(data, s, buckets, signal, show)
    if (s.textEncoder !== undefined) texts = await encodeCaptions(s.textEncoder, s, signal, show)
  } finally {
    progress.end()
    release()
  }
  const seconds = (performance.now() - began) / 1000
  const { clips, encoded, reused, bytes, bad } = latents
  say(`pyraflow: ${clips} clips, ${encoded} encoded, ${reused} found in the cache, ${bad.length} left out`)
  if (texts)
    say(`pyraflow: ${texts.texts} texts, ${texts.encoded} encoded, ${texts.reused} found in the cache`)
  if (!flags.json) return result(s.out)
  const left = bad.map(({ reason, place, error }) => ({ reason, place, message: error.message }))
  resultJson({ out: s.out, clips, encoded, reused, bytes, bad: left, texts: texts ?? null, seconds })
}

type Show = (label: string) => (done: number, total: number) => void

async function encodeClips(
  data: string,
  s: Settings,
  buckets: NonNullable<ReturnType<typeof bucketsIn>>,
  signal: AbortSignal,
  show: Show,
): Promise<EncodedLatents> {
  const { CausalVideoVAE } = await import('../models/causal-vae.ts')
  const { describeStale, encodeLatents } = await import('../train/latent-cache.ts')
  const { openDataset } = await import('../train/dataset.ts')
  const { fps, short, onBad, maxMemory } = s
  const onBadItem = ({ error }: { error: Error }): void =>
    say(`${paint('left out:', 'yellow')} ${error.message}`)
  const options = { buckets, fps, short, onBad, onBadItem, signal }
  const clips = await openDataset(data, { ...options, onProgress: show('looked at') })
  const vae = await CausalVideoVAE.fromPretrained(s.vae, { dtype: s.dtype, signal })
  try {
    return await encodeLatents(vae, clips, s.out, {
      signal,
      maxMemory,
      onProgress: show('encoded'),
      onStale: (stale) => say(`${paint('pyraflow:', 'yellow')} ${describeStale(stale)}`),
    })
  } finally {
    vae.dispose()
  }
}

async function encodeCaptions(
  dir: string,
  s: Settings,
  signal: AbortSignal,
  show: Show,
): Promise<EncodedTexts> {
  const { LatentDataset } = await import('../train/latents.ts')
  const { encodeTexts } = await import('../train/text-cache.ts')
  const cache = await LatentDataset.open(s.out)
  const { captions } = cache
  cache.dispose()
  return await encodeTexts(dir, captions, join(s.out, TEXT_FOLDER), {
    dtype: s.dtype,
    signal,
    onProgress: show('texts'),
    onWarning: (message) => say(`${paint('pyraflow:', 'yellow')} ${message}`),
  })
}
