import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { PyraflowError } from './errors.ts'

/** What the addon exports; the names are checked against it when it loads. */
export interface NativeBinding {
  /** Opens a backend and starts the engine thread. `commands` is the buffer that `submit` reads. */
  open(options: {
    backend: string
    deviceIndex: number
    threads: number
    maxMemory: number
    commands: Float64Array
  }): { backend: string; threads: number }
  close(): void
  /** Queues the commands that stand in the shared buffer, up to the first negative word. */
  submit(): void
  /** Queues a copy of host bytes into a storage. */
  write(storage: number, byteOffset: number, data: ArrayBufferView): void
  /** Queues a copy of a storage's bytes out; resolves when it is done. Rejects with the queue's first error. */
  read(storage: number, byteOffset: number, target: ArrayBufferView): Promise<void>
  /** Resolves when everything queued so far is done. Rejects with the queue's first error and clears it. */
  fence(): Promise<void>
  /** Drops queued ops (not frees) until the next fence resolves. */
  cancel(job?: number): void
  openFile(path: string): { id: number; size: number }
  closeFile(id: number): void
  memory(): { live: number; cached: number; peak: number; queued: number }
  resetPeak(): void
  packBytes(n: number, k: number, dtype: number, form: number): number
  profile(enabled: boolean): void
  profileRead(): { calls: Float64Array; seconds: Float64Array }
  info(): {
    /** `reason`: why not; `detail`: on which device. */
    backends: { name: string; usable: boolean; reason: string; detail: string }[]
    cores: number
  }
  /**
   * For bench/ only: measures a ceiling on the engine thread, in the queue's order. `job` holds the parameters (matmul
   * [m, n, k, dtype, seconds] → GFLOP/s, copy [bytes, seconds] → GB/s read and written, clock [] → s, onednn [] →
   * version) in five numbers; the result arrives in `job[0]`.
   */
  benchCeiling?(
    kind: 'matmul' | 'copy' | 'multiply-add' | 'clock' | 'onednn',
    job: Float64Array,
  ): Promise<void>
}

const FUNCTIONS = [
  'open',
  'close',
  'submit',
  'write',
  'read',
  'fence',
  'cancel',
  'openFile',
  'closeFile',
  'memory',
  'resetPeak',
  'packBytes',
  'profile',
  'profileRead',
  'info',
] as const satisfies readonly (keyof NativeBinding)[]

function packageRoot(): string {
  // lib/ sits at the root in the sources and under dist/ when built.
  let dir = dirname(fileURLToPath(import.meta.url))
  while (!existsSync(join(dir, 'package.json'))) {
    const parent = dirname(dir)
    if (parent === dir) break
    dir = parent
  }
  return dir
}

let binding: NativeBinding | undefined

/** Loads the addon on first use. @throws ERR_DEVICE when it was not built for this machine. */
export function native(): NativeBinding {
  if (binding) return binding
  const require = createRequire(import.meta.url)
  try {
    const load = require('node-gyp-build') as (root: string) => unknown
    binding = load(packageRoot()) as NativeBinding
  } catch (cause) {
    throw new PyraflowError('ERR_DEVICE', {
      what: `The native addon of pyraflow could not be loaded for ${process.platform}-${process.arch}`,
      remedy:
        'Build it with `npm run build:native` in the package folder; `npm run setup` installs what that needs.',
      cause,
    })
  }
  for (const name of FUNCTIONS) {
    if (typeof binding[name] !== 'function') {
      binding = undefined
      throw new PyraflowError('ERR_DEVICE', {
        what: `The native addon is of another version: it lacks ${name}()`,
        remedy: 'Rebuild it with `npm run build:native`.',
      })
    }
  }
  return binding
}
