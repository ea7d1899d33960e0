import type { Command } from 'commander'
import type { DownloadOptions } from '../io/download.ts'
import { type CommonOptions, interruptible, result, resultJson } from './console.ts'
import { makeProgress } from './progress.ts'
import { common, option } from './settings.ts'

type DownloadFlags = CommonOptions & Pick<DownloadOptions, 'variant' | 'revision' | 'endpoint' | 'cacheDir'>

export function addDownload(program: Command): void {
  const command = program
    .command('download')
    .description('download a published model into the cache that Python tools share; prints its folder')
    .argument('<repo>', 'repository, owner/name')
  option(command, '--variant <name>', 'transformer, where there are several, e.g. 384p')
  option(command, '--revision <name>', 'branch, tag or commit (default: main)')
  option(command, '--endpoint <url>', 'another server than https://huggingface.co; also HF_ENDPOINT')
  option(command, '--cache-dir <dir>', 'cache (default: HF_HUB_CACHE, HF_HOME or ~/.cache/huggingface/hub)')
  command.addHelpText(
    'after',
    '\nA token in HF_TOKEN is used. An interrupted download continues when it is called again.',
  )
  common(command).action(run)
}

const MEGA = 1e6

async function run(repo: string, flags: DownloadFlags): Promise<void> {
  const { downloadModel } = await import('../io/download.ts')
  const { variant, revision, endpoint, cacheDir } = flags
  const { signal, release } = interruptible()
  const progress = makeProgress(flags.progress)
  let began: { ms: number; bytes: number } | undefined
  try {
    const done = await downloadModel(repo, {
      ...{ variant, revision, endpoint, cacheDir, signal },
      onProgress: ({ file, done: bytes, total }) => {
        began ??= { ms: performance.now(), bytes }
        const speed = (bytes - began.bytes) / (performance.now() - began.ms)
        progress.update({
          label: 'MB',
          // All of a megabyte only when it is all there.
          done: bytes === total ? Math.ceil(total / MEGA) : Math.floor(bytes / MEGA),
          total: Math.ceil(total / MEGA),
          detail: speed > 0 ? `${file} · ${(speed / 1000).toFixed(1)} MB/s` : file,
          etaMs: speed > 0 ? (total - bytes) / speed : undefined,
        })
      },
    })
    if (flags.json) resultJson(done)
    else result(done.path)
  } finally {
    progress.end()
    release()
  }
}
