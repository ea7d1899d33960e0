import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { FluxConfig } from '../lib/models/flux-config.ts'

/** One sequence of a packed call: its text tokens and the tokens of each frame, oldest first. */
export interface TorchSequence {
  readonly text: number
  readonly frames: readonly number[]
}

/**
 * Median seconds of the same step in PyTorch (bench/torch_step.py), or why there is none. PyTorch is no dependency: it is
 * measured where a `python3` has it.
 */
export function torchStep(
  network: Partial<FluxConfig>,
  sequences: readonly TorchSequence[],
  threads: number,
  steps: number,
): { version: string; seconds: number } | string {
  const script = join(process.cwd(), 'bench', 'torch_step.py')
  if (!existsSync(script)) return `there is no ${script}; run it from the root of the repository`
  const probe = spawnSync('python3', ['-c', 'import torch; print(torch.__version__)'], { encoding: 'utf8' })
  if (probe.error) return 'there is no python3'
  if (probe.status !== 0) return `python3 cannot import torch (${probe.stderr.trim().split('\n').at(-1)})`
  const request = JSON.stringify({ network, sequences, threads, steps })
  const run = spawnSync('python3', [script], { input: request, encoding: 'utf8' })
  if (run.status !== 0) return `bench/torch_step.py failed: ${run.stderr.trim().split('\n').at(-1)}`
  return { version: probe.stdout.trim(), seconds: Number(run.stdout) }
}
