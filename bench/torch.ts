import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import type { FluxConfig } from '../lib/models/flux-config.ts'

/** One sequence of a packed call: its text tokens and the tokens of each frame, oldest first. */
export interface TorchSequence {
  readonly text: number
  readonly frames: readonly number[]
}

/** Has glibc keep what is freed, as guides to tuning PyTorch advise: else much of its step is the kernel's fresh pages. */
const KEEP_MEMORY = { MALLOC_MMAP_MAX_: '0', MALLOC_TRIM_THRESHOLD_: String(2 ** 40) }

/**
 * What a script of bench/ answers to a request, or why there is no answer. PyTorch is no dependency: it is measured
 * where a `python3` has it.
 */
function ask<T>(
  name: string,
  request: object,
  environment: NodeJS.ProcessEnv = {},
): { version: string; answer: T } | string {
  const script = join(process.cwd(), 'bench', name)
  if (!existsSync(script)) return `there is no ${script}; run it from the root of the repository`
  const probe = spawnSync('python3', ['-c', 'import torch; print(torch.__version__)'], { encoding: 'utf8' })
  if (probe.error) return 'there is no python3'
  if (probe.status !== 0) return `python3 cannot import torch (${probe.stderr.trim().split('\n').at(-1)})`
  const env = { ...process.env, ...environment }
  const run = spawnSync('python3', [script], { input: JSON.stringify(request), encoding: 'utf8', env })
  if (run.status !== 0) return `bench/${name} failed: ${run.stderr.trim().split('\n').at(-1)}`
  return { version: probe.stdout.trim(), answer: JSON.parse(run.stdout) as T }
}

/** Median seconds of the same step in PyTorch (bench/torch_step.py), by default and tuned, or why there is none. */
export function torchStep(
  network: Partial<FluxConfig>,
  sequences: readonly TorchSequence[],
  threads: number,
  steps: number,
): { version: string; answer: number; tuned: number } | string {
  const request = { network, sequences, threads, steps }
  const found = ask<number>('torch_step.py', request)
  if (typeof found === 'string') return found
  const tuned = ask<number>('torch_step.py', request, KEEP_MEMORY)
  return typeof tuned === 'string' ? tuned : { ...found, tuned: tuned.answer }
}

/** One attention call; the mask as in lib/ops/attention.ts. */
export interface TorchProblem {
  readonly dtype: 'f32' | 'bf16'
  readonly heads: number
  readonly length: number
  readonly dim: number
  readonly backward: boolean
  readonly mask?: { readonly segment: readonly number[]; readonly order: readonly number[] }
}

/** A convolution, a group norm with SiLU, or a step of AdamW, as bench/torch_ops.py takes them. */
export type TorchOp =
  | {
      readonly op: 'conv3d'
      readonly dtype: 'f32' | 'bf16'
      readonly channels: number
      readonly frames: number
      readonly height: number
      readonly width: number
    }
  | {
      readonly op: 'group_norm'
      readonly dtype: 'f32' | 'bf16'
      readonly images: number
      readonly pixels: number
      readonly channels: number
    }
  | { readonly op: 'adamw'; readonly count: number }

/** Name and seconds of every way in which PyTorch computes a problem. */
export type TorchTimes = [name: string, seconds: number][]

interface TorchOptions {
  device: 'cpu' | 'cuda'
  threads: number
  seconds: number
}

/** Those of attention (bench/torch_attention.py), or why there are none. */
export function torchAttention(
  problems: readonly TorchProblem[],
  options: TorchOptions,
): { version: string; answer: TorchTimes[] } | string {
  return ask('torch_attention.py', { problems, ...options })
}

/** Those of other ops (bench/torch_ops.py), or why there are none. */
export function torchOps(
  problems: readonly TorchOp[],
  options: TorchOptions,
): { version: string; answer: TorchTimes[] } | string {
  return ask('torch_ops.py', { problems, ...options })
}

/** The fastest of them. */
export const fastest = (times: TorchTimes | undefined): TorchTimes[number] | undefined =>
  [...(times ?? [])].sort(([, a], [, b]) => a - b)[0]
