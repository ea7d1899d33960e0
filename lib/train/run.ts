import { mkdir, rm } from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import { engine } from '../engine/engine.ts'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { ioError, syncFolder, writeAtomically } from '../io/atomic.ts'
import { bestCheckpoint, Checkpoints, latestCheckpoint, removeRemains } from './run/checkpoints.ts'
import { badLoss, firstBadGradient } from './run/culprit.ts'
import { plotRun } from './run/curves.ts'
import type { NotedEvent, TrainEvent } from './run/events.ts'
import { Metrics } from './run/metrics.ts'
import { MicroSteps, type StepNumbers } from './run/micro-steps.ts'
import { checkRun, type RunOptions } from './run/settings.ts'

export { bestCheckpoint, type Checkpoint, latestCheckpoint } from './run/checkpoints.ts'
export { type PlotOptions, plotRun } from './run/curves.ts'
export type { TrainEvent } from './run/events.ts'
export type { StepLoss } from './run/micro-steps.ts'
export { type RunOptions, type RunSettings, runSettings } from './run/settings.ts'

/**
 * The loop that every trainer shares: prepare, forward, backward, update, note, save. One micro-step computes while the
 * next is prepared and queued. A checkpoint folder appears under its name only when it is complete and on the disk;
 * resuming continues with the same numbers an uninterrupted run would have had, at whatever moment that one ended.
 * @throws ERR_ABORTED after saving, ERR_NUMERICS after too many bad steps, ERR_IO, ERR_OPTION for settings that mean
 * nothing and for a folder with the checkpoints of another run when `resume` is not set.
 */
export async function* runTraining(options: RunOptions): AsyncGenerator<TrainEvent> {
  checkRun(options)
  yield* new Run(options).events()
}

class Run {
  readonly #o: RunOptions
  readonly #checkpoints: Checkpoints
  readonly #job = engine.newJob()
  #metrics: Metrics | undefined
  /** In a row. */
  #skipped = 0
  /** Since the last checkpoint that followed a good step: as many went back to the same weights. */
  #rollbacks = 0
  #lastIsGood = true
  #bestLoss = Number.POSITIVE_INFINITY

  constructor(options: RunOptions) {
    this.#o = options
    const { out, keepCheckpoints = 2, keepBest = true } = options
    this.#checkpoints = new Checkpoints(out, options, keepCheckpoints, keepBest)
  }

  async *events(): AsyncGenerator<TrainEvent> {
    const { out, steps, optimizer, companions = {}, nonFinite } = this.#o
    await mkdir(out, { recursive: true }).catch((error: unknown) => {
      throw ioError(error, 'make run folder', out)
    })
    await syncFolder(dirname(out))
    await removeRemains(out)
    // A run before this one may have ended between two micro-steps.
    for (const each of [optimizer, ...Object.values(companions)]) each.zeroGrad()
    const first = yield* this.#begin()
    const metrics = await Metrics.open(out, first)
    this.#metrics = metrics
    try {
      if (first === 0 && nonFinite?.policy === 'rollback') yield await this.#save(0)
      if (first > 0) yield* this.#between(first, metrics.begun)
      const micro = new MicroSteps(this.#o, this.#job, first)
      let before = performance.now()
      for (let step = first; step < steps; step++) {
        const numbers = await micro.run(step)
        if (!numbers) return yield* this.#stopped(step)
        const now = performance.now()
        yield await this.#noted(await this.#update(step, numbers, (now - before) / 1000))
        before = now
        yield* this.#between(step + 1)
      }
    } finally {
      await metrics.close()
    }
  }

  /** Gives the number of steps that are done already. */
  async *#begin(): AsyncGenerator<TrainEvent, number> {
    const { out, resume } = this.#o
    const found = await latestCheckpoint(out)
    if (!found) return 0
    if (!resume) {
      // Its checkpoints would count as the newer ones, and the first of the new run would be removed as old.
      throw new PyraflowError('ERR_OPTION', {
        what: 'out',
        expected: 'a folder without checkpoints for a run that begins',
        received: `${out}, which has one of step ${found.step}`,
        remedy: 'Resume that run, or choose another folder.',
      })
    }
    await this.#checkpoints.restore(found)
    // A run that was killed between a save and this had no time for it.
    await this.#checkpoints.removeOld()
    this.#skipped = found.skipped ?? 0
    this.#rollbacks = found.rollbacks ?? 0
    this.#lastIsGood = this.#skipped + this.#rollbacks === 0
    this.#bestLoss = (await bestCheckpoint(out))?.validation ?? this.#bestLoss
    yield { type: 'resume', step: found.step }
    return found.step
  }

  /** Uses the gradients of a step, or drops them when something about it is wrong. */
  async #update(step: number, numbers: StepNumbers, seconds: number): Promise<NotedEvent> {
    const { optimizer, learningRates, maxLoss = Number.POSITIVE_INFINITY } = this.#o
    const { loss, metrics, gradNorm, clip } = numbers
    try {
      const finite = Number.isFinite(loss) && Number.isFinite(gradNorm)
      this.#lastIsGood = finite && loss < maxLoss
      if (this.#lastIsGood) {
        this.#skipped = 0
        const learningRate = learningRates[step] as number
        engine.within(this.#job, () => optimizer.step(learningRate, clip))
        return { type: 'step', step: step + 1, loss, gradNorm, learningRate, seconds, ...metrics }
      }
      let culprit: string | undefined
      if (!Number.isFinite(loss)) culprit = badLoss(metrics)
      else if (!finite) culprit = (await firstBadGradient(optimizer.parameters, this.#job)) ?? 'gradient norm'
      engine.within(this.#job, () => optimizer.zeroGrad())
      return await this.#bad(step + 1, numbers, culprit)
    } finally {
      clip.dispose()
    }
  }

  /** @throws ERR_NUMERICS when policy or limit say so */
  async #bad(
    step: number,
    { loss, gradNorm }: StepNumbers,
    culprit: string | undefined,
  ): Promise<NotedEvent> {
    const { policy = 'skip', limit = 5 } = this.#o.nonFinite ?? {}
    const back = policy === 'rollback' && culprit !== undefined
    const count = back ? ++this.#rollbacks : ++this.#skipped
    if (count >= limit || (policy === 'fail' && culprit !== undefined)) {
      const times = count > 1 ? `, ${count} times ${back ? 'after one checkpoint' : 'in a row'}` : ''
      throw new PyraflowError('ERR_NUMERICS', {
        what: `training step ${step}: loss ${loss}, gradient norm ${gradNorm}${times}`,
        expected: culprit === undefined ? `a loss below ${this.#o.maxLoss} (maxLoss)` : `a finite ${culprit}`,
        remedy: 'Lower the learning rate, or resume from an earlier checkpoint.',
      })
    }
    if (!back) return { type: 'skipped', step, loss, ...(culprit === undefined ? {} : { culprit }) }
    const last = await latestCheckpoint(this.#o.out)
    if (!last) {
      throw new PyraflowError('ERR_IO', {
        what: `run folder ${this.#o.out}`,
        expected: 'a checkpoint to roll back to',
        received: 'none',
        remedy: 'Leave the checkpoints of a running training where they are.',
      })
    }
    await this.#checkpoints.restore(last)
    return { type: 'rollback', step, to: last.step, culprit }
  }

  async #noted<E extends NotedEvent>(event: E): Promise<E> {
    await this.#metrics?.note(event)
    return event
  }

  /**
   * What follows step `done`: validation, samples, checkpoint. In a run that was resumed there, only what an interrupt
   * kept from it: `begun` is what had been noted before.
   */
  async *#between(done: number, begun?: ReadonlySet<string>): AsyncGenerator<TrainEvent> {
    const { steps, checkpointEvery, validateEvery, validate, sampleEvery, sample, keepBest = true } = this.#o
    const due = (every: number | undefined): boolean => every !== undefined && done % every === 0
    let validation: number | undefined
    if (validate && due(validateEvery) && !begun?.has('validation')) {
      const found = await this.#unlessStopped(validate(done))
      if (!found) return yield* this.#stopped(done)
      yield await this.#noted({ ...found, type: 'validation', step: done, loss: found.loss })
      validation = found.loss
    }
    if (sample && due(sampleEvery) && !begun?.has('samples')) {
      const files = await this.#unlessStopped(this.#sample(done, sample))
      if (!files) return yield* this.#stopped(done, validation)
      yield await this.#noted({ type: 'samples', step: done, files })
    }
    const best = keepBest && validation !== undefined && validation < this.#bestLoss
    const end = !begun && (due(checkpointEvery) || done === steps)
    if (!best && !end && !(begun && validation !== undefined)) return
    const saved = await this.#save(done, validation)
    yield saved
    if (!best) return
    this.#bestLoss = validation as number
    yield { type: 'best', step: done, loss: this.#bestLoss, path: saved.path }
  }

  /** Samples in a folder of their own, which appears when it is complete. */
  async #sample(step: number, write: NonNullable<RunOptions['sample']>): Promise<string[]> {
    const folder = join(this.#o.out, `samples-${step}`)
    let files: string[] = []
    let failed: unknown
    await writeAtomically(folder, async (dir) => {
      await mkdir(dir)
      const written = await write(step, dir).catch((error: unknown) => {
        failed = error
        throw error
      })
      files = written.map((file) => join(folder, relative(dir, file)))
      await rm(folder, { recursive: true, force: true })
    }).catch((error: unknown) => {
      // Errors of the hook are its own, not those of a file.
      throw failed ?? error
    })
    return files
  }

  /** The result of a hook; undefined when it ended because of the signal. */
  async #unlessStopped<T>(work: Promise<T>): Promise<T | undefined> {
    try {
      return await work
    } catch (error) {
      if (this.#o.signal?.aborted) return undefined
      throw error
    }
  }

  /** Saves what is done, and ends. @throws ERR_ABORTED */
  async *#stopped(step: number, validation?: number): AsyncGenerator<TrainEvent> {
    yield await this.#save(step, validation)
    throwIfAborted(this.#o.signal, 'training')
  }

  async #save(step: number, validation?: number): Promise<TrainEvent & { type: 'checkpoint' }> {
    if (this.#lastIsGood) this.#rollbacks = 0
    // The history up to a checkpoint must not be lost while the checkpoint stays.
    await this.#metrics?.sync()
    const path = await this.#checkpoints.save({
      step,
      skipped: this.#skipped,
      rollbacks: this.#rollbacks,
      validation,
    })
    // A drawing that fails must not end a run: it can be made again, and a full disk stops the next line of metrics.
    if (this.#o.plot ?? true) await plotRun(this.#o.out).catch(() => undefined)
    return { type: 'checkpoint', step, path }
  }
}
