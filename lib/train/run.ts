import { createWriteStream, type WriteStream } from 'node:fs'
import { mkdir, readdir, readFile, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { engine } from '../engine/engine.ts'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { ioError, writeFileAtomically } from '../io/atomic.ts'
import { writeSafetensors } from '../io/safetensors.ts'
import { sliced } from '../tensor/sliced.ts'
import { backwardSteps, type Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { AdamW } from './optimizer.ts'

export type TrainEvent =
  | { type: 'resume'; step: number }
  | {
      type: 'step'
      step: number
      loss: number
      gradNorm: number
      learningRate: number
      seconds: number
      [metric: string]: number | string
    }
  | { type: 'skipped'; step: number; loss: number }
  | { type: 'checkpoint'; step: number; path: string }

/** What a forward pass gives: the loss and numbers to report beside it, all of one element. */
export interface StepLoss {
  loss: Tensor
  metrics?: Record<string, Tensor>
}

export interface RunOptions {
  /** Folder of the run: checkpoints and metrics.jsonl. */
  out: string
  steps: number
  learningRates: Float64Array
  optimizer: AdamW
  /** Optimizers that `forward` steps itself; saved and restored with the run under their names. */
  companions?: Readonly<Record<string, AdamW>> | undefined
  /** Host work of a step (reading, decoding); runs while the previous step computes. */
  prepare(step: number): Promise<unknown>
  /** Queues the forward pass, pausing now and then; the run queues backward and the update. */
  forward(step: number, prepared: never): Steps<StepLoss>
  /** Writes the model itself into a checkpoint folder. */
  saveModel(dir: string): Promise<void>
  /** Steps between checkpoints; the last step always writes one. */
  checkpointEvery?: number
  /** Checkpoints kept. */
  keepCheckpoints?: number
  resume?: boolean
  signal?: AbortSignal | undefined
}

const STATE = 'optimizer.safetensors'
const companionState = (name: string): string => `${name}-${STATE}`
const MOST_BAD_STEPS = 5

/**
 * The loop that every trainer shares: prepare, forward, backward, update, note, save. One step computes while the next is
 * prepared and queued. A checkpoint folder appears under its name only when it is complete; resuming continues with the
 * same numbers an uninterrupted run would have had.
 * @throws ERR_ABORTED after saving, ERR_NUMERICS after several steps without a finite loss, ERR_IO.
 */
export async function* runTraining(options: RunOptions): AsyncGenerator<TrainEvent> {
  const { out, steps, optimizer, signal } = options
  await mkdir(out, { recursive: true }).catch((error: unknown) => {
    throw ioError(error, 'make run folder', out)
  })
  let first = 0
  if (options.resume) {
    const found = await latestCheckpoint(out)
    if (found) {
      optimizer.restore(join(found.path, STATE), found.step)
      for (const [name, companion] of Object.entries(options.companions ?? {})) {
        // A run may get a companion later in its life; that one begins now.
        const steps = found.companions?.[name]
        if (steps !== undefined) companion.restore(join(found.path, companionState(name)), steps)
      }
      first = found.step
      yield { type: 'resume', step: first }
    }
    await forgetMetricsAfter(join(out, 'metrics.jsonl'), first)
  }
  await removeRemains(out)
  const metrics = createWriteStream(join(out, 'metrics.jsonl'), { flags: 'a' })
  // Writes after the first failure only report that the stream is gone; the first says why.
  let broken: unknown
  metrics.on('error', (error) => {
    broken ??= error
  })
  const job = engine.newJob()
  let bad = 0
  let before = performance.now()
  let prepared = first < steps ? options.prepare(first) : undefined
  prepared?.catch(() => undefined)
  try {
    for (let step = first; step < steps; step++) {
      // An abort may also end the preparation early; either way the state is saved before the run ends.
      const input = signal?.aborted
        ? undefined
        : await prepared?.catch((error: unknown) => {
            if (!signal?.aborted) throw error
          })
      if (signal?.aborted) {
        yield await saved(options, step)
        throwIfAborted(signal, 'training')
      }
      const learningRate = options.learningRates[step] as number
      const queued = await sliced(
        function* () {
          const { loss, metrics: named = {} } = yield* options.forward(step, input as never)
          yield* backwardSteps(loss)
          return { loss, clip: optimizer.step(learningRate), named }
        },
        { job },
      )
      const tensors = [queued.loss, queued.clip, ...Object.values(queued.named)]
      if (step + 1 < steps) {
        prepared = options.prepare(step + 1)
        prepared.catch(() => undefined)
      }
      const extra: Record<string, number> = {}
      let loss: number
      let gradNorm: number
      let coefficient: number
      try {
        loss = await queued.loss.item()
        ;[gradNorm, coefficient] = (await queued.clip.floats()) as unknown as [number, number]
        for (const [name, t] of Object.entries(queued.named)) extra[name] = await t.item()
      } finally {
        for (const t of tensors) t.dispose()
      }
      const now = performance.now()
      const seconds = (now - before) / 1000
      before = now
      if (!Number.isFinite(loss) || !Number.isFinite(coefficient)) {
        // The optimizer has left the weights alone; a run of such steps cannot heal itself.
        if (++bad >= MOST_BAD_STEPS) {
          throw new PyraflowError('ERR_NUMERICS', {
            what: `training step ${step + 1}: loss ${loss}, gradient norm ${gradNorm}, ${bad} times in a row`,
            remedy: 'Lower the learning rate, or resume from an earlier checkpoint.',
          })
        }
        yield { type: 'skipped', step: step + 1, loss }
      } else {
        bad = 0
        const event: TrainEvent = {
          type: 'step',
          step: step + 1,
          loss,
          gradNorm,
          learningRate,
          seconds,
          ...extra,
        }
        try {
          await note(metrics, event)
        } catch (error) {
          throw ioError(broken ?? error, 'write metrics', join(out, 'metrics.jsonl'))
        }
        yield event
      }
      const done = step + 1
      if (done === steps || (options.checkpointEvery && done % options.checkpointEvery === 0)) {
        yield await saved(options, done)
      }
    }
  } finally {
    await new Promise<void>((resolve) => metrics.end(() => resolve()))
  }
}

/** Steps that a killed run noted after its last checkpoint will be run, and noted, again. */
async function forgetMetricsAfter(path: string, step: number): Promise<void> {
  const text = await readFile(path, 'utf8').catch(() => '')
  const lines = text.split('\n')
  const kept = lines.filter((line) => {
    try {
      return (JSON.parse(line) as { step: number }).step <= step
    } catch {
      return false // the line that the kill cut short
    }
  })
  if (kept.length < lines.length - 1)
    await writeFileAtomically(path, kept.map((line) => `${line}\n`).join(''))
}

async function note(stream: WriteStream, event: object): Promise<void> {
  await new Promise<void>((resolve, reject) => {
    stream.write(`${JSON.stringify(event)}\n`, (error) => (error ? reject(error) : resolve()))
  })
}

/** What a killed run left behind: checkpoints that were being written or removed. */
async function removeRemains(out: string): Promise<void> {
  for (const name of await readdir(out)) {
    if (/^checkpoint-\d+\.tmp$/.test(name)) await rm(join(out, name), { recursive: true, force: true })
  }
}

async function saved(options: RunOptions, step: number): Promise<TrainEvent> {
  const path = join(options.out, `checkpoint-${step}`)
  const partial = `${path}.tmp`
  try {
    await rm(partial, { recursive: true, force: true })
    await mkdir(partial, { recursive: true })
    await options.saveModel(partial)
    await writeSafetensors(join(partial, STATE), options.optimizer.stateTensors())
    const state: State = { step }
    for (const [name, companion] of Object.entries(options.companions ?? {})) {
      await writeSafetensors(join(partial, companionState(name)), companion.stateTensors())
      state.companions = { ...state.companions, [name]: companion.stepCount }
    }
    await writeFileAtomically(join(partial, 'state.json'), `${JSON.stringify(state)}\n`)
    await rm(path, { recursive: true, force: true })
    await rename(partial, path)
  } catch (error) {
    await rm(partial, { recursive: true, force: true }).catch(() => undefined)
    throw error instanceof PyraflowError ? error : ioError(error, 'write checkpoint', path)
  }
  const kept = options.keepCheckpoints ?? 2
  const all = await checkpoints(options.out)
  for (const old of all.slice(0, Math.max(0, all.length - kept))) {
    // Renamed first: a half-removed folder must not pass for a checkpoint.
    await rename(old.path, `${old.path}.tmp`)
    await rm(`${old.path}.tmp`, { recursive: true, force: true })
  }
  return { type: 'checkpoint', step, path }
}

async function checkpoints(out: string): Promise<{ step: number; path: string }[]> {
  const names = await readdir(out).catch(() => [] as string[])
  return names
    .map((name) => ({ match: /^checkpoint-(\d+)$/.exec(name), name }))
    .filter(({ match }) => match !== null)
    .map(({ match, name }) => ({ step: Number((match as RegExpExecArray)[1]), path: join(out, name) }))
    .sort((a, b) => a.step - b.step)
}

/** What a checkpoint's state.json holds. */
interface State {
  step: number
  /** Steps that each companion optimizer has done. */
  companions?: Record<string, number>
}

/** The newest complete checkpoint of a run, if any. */
export async function latestCheckpoint(out: string): Promise<(State & { path: string }) | undefined> {
  const found = (await checkpoints(out)).at(-1)
  if (!found) return undefined
  try {
    const state = JSON.parse(await readFile(join(found.path, 'state.json'), 'utf8')) as State
    return { ...state, path: found.path }
  } catch (error) {
    throw ioError(error, 'read checkpoint', found.path)
  }
}
