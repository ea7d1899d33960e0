import { mkdir, readdir, readFile, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { PyraflowError } from '../../engine/errors.ts'
import { ioError, writeAtomically, writeFileAtomically } from '../../io/atomic.ts'
import { writeSafetensors } from '../../io/safetensors.ts'
import type { AdamW } from '../optimizer.ts'

/** What a checkpoint's state.json holds. */
interface State {
  /** Steps of the run that are done: the data goes on from here. */
  step: number
  /** Updates the optimizer has made; fewer than `step` after bad steps. */
  updates?: number
  /** Steps skipped in a row at that point, and rollbacks since the checkpoint before. */
  skipped?: number
  rollbacks?: number
  /** Updates of each companion optimizer. */
  companions?: Record<string, number>
  /** Validation loss at this step, if there was a validation. */
  validation?: number | undefined
}

export interface Checkpoint extends Readonly<State> {
  readonly path: string
}

/** What a checkpoint is made of. */
export interface Saved {
  readonly optimizer: AdamW
  readonly companions?: Readonly<Record<string, AdamW>> | undefined
  saveModel(dir: string): Promise<void>
}

const OPTIMIZER = 'optimizer.safetensors'
const STATE = 'state.json'
const companionFile = (name: string): string => `${name}-${OPTIMIZER}`

/** The checkpoints of a run folder. Which is the best one is read from them: there is no pointer that could dangle. */
export class Checkpoints {
  readonly #out: string
  readonly #saved: Saved
  readonly #keep: number
  readonly #keepBest: boolean

  constructor(out: string, saved: Saved, keep: number, keepBest: boolean) {
    this.#out = out
    this.#saved = saved
    this.#keep = keep
    this.#keepBest = keepBest
  }

  /**
   * Writes a checkpoint, then removes those that are no longer kept. The folder appears under its name when all of it
   * is on the disk. One that is there already has these bits; only a validation may be new to it.
   * @throws ERR_IO, whatever `saveModel` throws
   */
  async save(progress: Omit<State, 'companions' | 'updates'>): Promise<string> {
    const { optimizer, companions = {} } = this.#saved
    const { step, skipped, rollbacks, validation } = progress
    const path = join(this.#out, `checkpoint-${step}`)
    const state: State = { step, updates: optimizer.stepCount }
    // Whatever is usual is left out.
    if (skipped) state.skipped = skipped
    if (rollbacks) state.rollbacks = rollbacks
    if (validation !== undefined && Number.isFinite(validation)) state.validation = validation
    for (const [name, { stepCount }] of Object.entries(companions))
      state.companions = { ...state.companions, [name]: stepCount }
    const writeState = (dir: string): Promise<void> =>
      writeFileAtomically(join(dir, STATE), `${JSON.stringify(state)}\n`)
    if ((await list(this.#out)).some((known) => known.step === step)) {
      if (state.validation !== undefined) await writeState(path)
    } else {
      await writeAtomically(path, async (dir) => {
        await mkdir(dir)
        await this.#saved.saveModel(dir)
        await writeSafetensors(join(dir, OPTIMIZER), optimizer.stateTensors())
        for (const [name, companion] of Object.entries(companions))
          await writeSafetensors(join(dir, companionFile(name)), companion.stateTensors())
        await writeState(dir)
      })
    }
    await this.removeOld()
    return path
  }

  /** Puts the optimizers back to where they were. @throws ERR_IO, ERR_CHECKPOINT */
  async restore(checkpoint: Checkpoint): Promise<void> {
    const { optimizer, companions = {} } = this.#saved
    const { path, step, updates = step } = checkpoint
    await optimizer.restore(join(path, OPTIMIZER), updates)
    for (const [name, companion] of Object.entries(companions)) {
      // A run may get a companion later in its life; that one begins now.
      const done = checkpoint.companions?.[name]
      if (done !== undefined) await companion.restore(join(path, companionFile(name)), done)
    }
  }

  /** Removes the checkpoints that are no longer kept. @throws ERR_IO */
  async removeOld(): Promise<void> {
    const all = await list(this.#out)
    const old = all.slice(0, Math.max(0, all.length - this.#keep))
    if (old.length === 0) return
    const best = this.#keepBest ? await bestCheckpoint(this.#out) : undefined
    for (const { path, step } of old) {
      if (step === best?.step) continue
      try {
        // Renamed first: a half-removed folder must not pass for a checkpoint.
        await rename(path, `${path}.tmp`)
        await rm(`${path}.tmp`, { recursive: true, force: true })
      } catch (error) {
        throw ioError(error, 'remove checkpoint', path)
      }
    }
  }
}

/** Removes what a killed run left behind: folders and files that were being written or removed. @throws ERR_IO */
export async function removeRemains(out: string): Promise<void> {
  for (const dir of [out, ...(await list(out)).map(({ path }) => path)]) {
    for (const name of await readdir(dir)) {
      if (!REMAINS.test(name)) continue
      const path = join(dir, name)
      await rm(path, { recursive: true, force: true }).catch((error: unknown) => {
        throw ioError(error, 'remove', path)
      })
    }
  }
}

const REMAINS = /^(checkpoint-\d+|\.(checkpoint-\d+|samples-\d+|loss\.svg|state\.json)\..+)\.tmp$/

async function list(out: string): Promise<{ step: number; path: string }[]> {
  const names = await readdir(out).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [] as string[]
    throw ioError(error, 'read run folder', out)
  })
  return names
    .flatMap((name) => /^checkpoint-(\d+)$/.exec(name)?.[1] ?? [])
    .map((digits) => ({ step: Number(digits), path: join(out, `checkpoint-${digits}`) }))
    .sort((a, b) => a.step - b.step)
}

async function read(path: string): Promise<Checkpoint> {
  const file = join(path, STATE)
  const text = await readFile(file, 'utf8').catch((error: unknown) => {
    throw ioError(error, 'read checkpoint', file)
  })
  let state: unknown
  try {
    state = JSON.parse(text)
  } catch {}
  if (typeof state === 'object' && state !== null && Number.isInteger((state as State).step))
    return { ...(state as State), path }
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: file,
    expected: 'the state of a checkpoint',
    received: text.slice(0, 40),
    remedy: 'Remove this checkpoint folder to go on from the one before it.',
  })
}

/** The newest checkpoint of a run, if any. @throws ERR_IO, ERR_CHECKPOINT when it cannot be read */
export async function latestCheckpoint(out: string): Promise<Checkpoint | undefined> {
  const found = (await list(out)).at(-1)
  return found && (await read(found.path))
}

/**
 * The checkpoint of a run with the lowest validation loss, the older of equals; undefined where none was validated.
 * @throws ERR_IO, ERR_CHECKPOINT when one cannot be read
 */
export async function bestCheckpoint(
  out: string,
): Promise<(Checkpoint & { readonly validation: number }) | undefined> {
  let best: (Checkpoint & { validation: number }) | undefined
  for (const { path } of await list(out)) {
    const { validation, ...rest } = await read(path)
    if (validation !== undefined && validation < (best?.validation ?? Number.POSITIVE_INFINITY))
      best = { ...rest, validation }
  }
  return best
}
