import { availableParallelism, cpus, freemem, totalmem } from 'node:os'
import type { Command } from 'commander'
import type { CommonOptions } from './console.ts'
import { EXIT, result, resultJson } from './console.ts'
import { common, configureEngine } from './settings.ts'
import { packageVersion } from './version.ts'

interface Info {
  versions: { pyraflow: string; node: string; platform: string }
  cpu: { model: string; cores: number }
  memory: { totalBytes: number; freeBytes: number }
  /** Null when the addon could not be loaded. */
  device: { backend: string; threads: number } | null
  backends: { name: string; usable: boolean; reason: string; detail: string }[]
  ffmpeg: { found: boolean; command: string }
  problem?: string
}

export function addInfo(program: Command): void {
  const command = program
    .command('info')
    .description('versions, backends and why each is or is not used, memory, ffmpeg')
  common(command).action(run)
}

async function run(flags: CommonOptions): Promise<void> {
  await configureEngine(flags)
  const { engine } = await import('../engine/engine.ts')
  const { hasFfmpeg } = await import('../io/video.ts')
  const { ffmpegCommand } = await import('../io/ffmpeg.ts')
  const info: Info = {
    versions: {
      pyraflow: packageVersion(),
      node: process.version,
      platform: `${process.platform}-${process.arch}`,
    },
    cpu: { model: cpus()[0]?.model ?? 'unknown', cores: availableParallelism() },
    memory: { totalBytes: totalmem(), freeBytes: freemem() },
    device: null,
    backends: [],
    ffmpeg: { found: await hasFfmpeg(), command: ffmpegCommand() },
  }
  try {
    info.backends = engine.info().backends
    info.device = { ...engine.device }
  } catch (error) {
    // A machine where the engine does not run is what this command is for.
    info.problem = error instanceof Error ? error.message : String(error)
    process.exitCode = EXIT.failed
  }
  if (flags.json) resultJson(info)
  else for (const text of describe(info)) result(text)
}

function describe(info: Info): string[] {
  const { versions, cpu, memory, device } = info
  const gib = (bytes: number): string => `${(bytes / 2 ** 30).toFixed(1)} GiB`
  return [
    `pyraflow  ${versions.pyraflow} on Node ${versions.node}, ${versions.platform}`,
    `cpu       ${cpu.model}, ${cpu.cores} cores`,
    `memory    ${gib(memory.totalBytes)}, ${gib(memory.freeBytes)} free`,
    device ? `device    ${device.backend}, ${device.threads} threads` : `device    none: ${info.problem}`,
    ...info.backends.map(({ name, usable, reason, detail }) => {
      const chosen = device?.backend === name
      const state = chosen
        ? 'in use'
        : usable
          ? `usable, not used because ${device?.backend} was chosen`
          : 'not usable'
      const about = reason || detail
      return `          ${name}: ${state}${about ? ` (${about})` : ''}`
    }),
    `ffmpeg    ${info.ffmpeg.found ? info.ffmpeg.command : 'not found: mp4 needs it; .webp, .gif and .png work without'}`,
  ]
}
