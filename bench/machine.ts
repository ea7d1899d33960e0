import { availableParallelism, cpus, totalmem } from 'node:os'
import { engine } from '../lib/engine/engine.ts'
import { ceiling } from './harness.ts'

/** What a figure was measured on. */
export interface Machine {
  cpu: string
  cores: number
  memoryBytes: number
  /** The GPU, where one is used. */
  device: string | null
  /** The backend in use, which names the instruction level. */
  backend: string
  threads: number
  node: string
  platform: string
  /** Of the loaded library, null without it. */
  onednn: string | null
}

export async function describeMachine(): Promise<Machine> {
  const { backend, threads } = engine.device
  const version = await ceiling('onednn').catch(() => null)
  const part = (unit: number): number => Math.floor((version ?? 0) / unit) % 100
  return {
    cpu: cpus()[0]?.model.trim() ?? 'unknown',
    cores: availableParallelism(),
    memoryBytes: totalmem(),
    device: engine.info().backends.find(({ name }) => name === backend)?.detail || null,
    backend,
    threads,
    node: process.version,
    platform: `${process.platform}-${process.arch}`,
    onednn: version === null ? null : `${part(10_000)}.${part(100)}.${part(1)}`,
  }
}

/** File name of a machine's results, e.g. `amd-epyc-2-cores`. */
export function slugOf({ cpu, cores, device }: Machine): string {
  const name = (device?.split(',')[0] ?? cpu)
    .toLowerCase()
    .replace(/\((r|tm)\)/g, '')
    .replace(/[^a-z0-9]+/g, '-')
  return (device ? name : `${name}-${cores}-cores`).replace(/-+/g, '-').replace(/^-/, '')
}
