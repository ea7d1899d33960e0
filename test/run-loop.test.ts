import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { bestCheckpoint, latestCheckpoint, type TrainEvent } from '../lib/train/run.ts'
import { collect, losses } from './fixtures/events.ts'
import { noted, type ToyOptions, ToyRun } from './fixtures/toy-run.ts'

const folder = mkdtempSync(join(tmpdir(), 'run-loop-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

interface Ran {
  events: TrainEvent[]
  error: unknown
  hash: string
  lines: Record<string, unknown>[]
}

/** One process's part of a run: until its end, an error, or `leave`, where the caller goes away without a word. */
async function part(options: ToyOptions, leave?: (event: TrainEvent) => boolean): Promise<Ran> {
  const toy = new ToyRun(options)
  const events: TrainEvent[] = []
  let error: unknown
  try {
    for await (const event of toy.run()) {
      events.push(event)
      if (leave?.(event)) break
    }
  } catch (thrown) {
    error = thrown
  }
  const hash = await toy.hash()
  toy.dispose()
  return { events, error, hash, lines: noted(options.out) }
}

const of = (events: readonly TrainEvent[], type: TrainEvent['type']): number[] =>
  events.flatMap((event) => (event.type === type ? [event.step] : []))
const folders = (out: string): string[] => readdirSync(out).filter((name) => name.startsWith('checkpoint'))

describe('gradient accumulation', () => {
  test('over the same data twice changes no bit, since the gradients are averaged', async () => {
    // Micro-steps 2n and 2n + 1 get the data of step n: halves add up to the whole exactly.
    const once = await part({ out: join(folder, 'once'), steps: 6, companions: {} })
    const toy = new ToyRun({ out: join(folder, 'twice'), steps: 6, accumulate: 2, companions: {} })
    const other = new ToyRun({ out: '', steps: 6 })
    toy.options.prepare = (step) => other.options.prepare(step, 0)
    const twice = await collect(toy.run())
    expect(losses(twice)).toEqual(losses(once.events))
    const norms = (events: readonly TrainEvent[]): unknown[] =>
      events.flatMap((e) => (e.type === 'step' ? [e.gradNorm] : []))
    expect(norms(twice)).toEqual(norms(once.events))
    for (const run of [toy, other]) run.dispose()
  })

  test('reports the mean of the losses, and prepares a micro-step while the one before it computes', async () => {
    const log: string[] = []
    const toy = new ToyRun({
      out: join(folder, 'order'),
      steps: 2,
      accumulate: 3,
      log: (what) => log.push(what),
    })
    const single: number[] = []
    const forward = toy.options.forward
    toy.options.forward = function* (step, x, micro) {
      const made = yield* forward(step, x, micro)
      void made.loss.item().then((loss) => single.push(loss))
      return made
    }
    for await (const event of toy.run())
      if (event.type === 'step') log.push(`step ${event.step} ${event.loss}`)
    const average = (from: number): number => single.slice(from, from + 3).reduce((a, b) => a + b) / 3
    const step = (n: number): string[] =>
      [0, 1, 2].flatMap((m) => [`forward ${n}.${m}`, m < 2 ? `prepare ${n}.${m + 1}` : `prepare ${n + 1}.0`])
    expect(log).toEqual([
      'prepare 0.0',
      ...step(0),
      `step 1 ${average(0)}`,
      ...step(1).slice(0, -1),
      `step 2 ${average(3)}`,
    ])
    toy.dispose()
  })

  test('an abort between micro-steps does not wait for the rest of the step, and resuming repeats it', async () => {
    const options = { steps: 6, accumulate: 4 }
    const whole = await part({ ...options, out: join(folder, 'micro-whole') })
    const out = join(folder, 'micro')
    const stop = new AbortController()
    const log: string[] = []
    const first = new ToyRun({
      ...options,
      out,
      log: (what) => {
        log.push(what)
        if (what === 'forward 3.1') stop.abort()
      },
    })
    const begun: TrainEvent[] = []
    await expect(collect(first.run({ signal: stop.signal }), begun)).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    })
    expect(log).not.toContain('forward 3.2')
    expect(begun.at(-1)).toMatchObject({ type: 'checkpoint', step: 3 })
    first.dispose()
    const second = await part({ ...options, out, resume: true })
    expect(losses([...begun, ...second.events])).toEqual(losses(whole.events))
    expect(second.hash).toBe(whole.hash)
  })

  test('lets the event loop turn every few milliseconds while a micro-step is queued', async () => {
    const toy = new ToyRun({ out: join(folder, 'turns'), steps: 1, accumulate: 2 })
    const forward = toy.options.forward
    toy.options.forward = function* (step, x, micro) {
      // Sixty times a millisecond of work: far more than may be done in one go.
      for (let i = 0; i < 60; i++) {
        const until = performance.now() + 1
        while (performance.now() < until);
        yield
      }
      return yield* forward(step, x, micro)
    }
    let [turns, going] = [0, true]
    const turn = (): void => {
      turns++
      if (going) setImmediate(turn)
    }
    setImmediate(turn)
    await collect(toy.run())
    going = false
    expect(turns).toBeGreaterThan(2 * (60 / 6))
    toy.dispose()
  })
})

describe('validation', () => {
  const given = [5, 4, 6, 3, 3, Number.NaN, 7, 2]
  const validate = async (step: number): Promise<{ loss: number; stage0: number }> => ({
    loss: given[step / 2 - 1] as number,
    stage0: step,
  })

  test('keeps the checkpoint of the lowest loss besides the newest ones, and names it', async () => {
    const out = join(folder, 'best')
    const { events } = await part({
      out,
      steps: 15,
      validateEvery: 2,
      validate,
      checkpointEvery: 5,
      keepCheckpoints: 1,
    })
    expect(events.filter((e) => e.type === 'validation').map(({ step, ...e }) => [step, e.loss])).toEqual(
      given.slice(0, 7).map((loss, i) => [2 * i + 2, loss]),
    )
    const best = events.flatMap((e) => (e.type === 'best' ? [[e.step, e.loss, e.path]] : []))
    expect(best).toEqual([2, 4, 8].map((step, i) => [step, 5 - i, join(out, `checkpoint-${step}`)]))
    expect(of(events, 'checkpoint')).toEqual([2, 4, 5, 8, 10, 15])
    expect(folders(out).sort()).toEqual(['checkpoint-15', 'checkpoint-8'])
    expect(await bestCheckpoint(out)).toMatchObject({ step: 8, validation: 3 })
    expect(await latestCheckpoint(out)).toMatchObject({ step: 15, updates: 15 })
  })

  test('goes on from the best loss so far after resuming, and writes no checkpoint for it when not asked to', async () => {
    const out = join(folder, 'best-resume')
    const options = { out, validateEvery: 2, validate, keepCheckpoints: 1 }
    await part({ ...options, steps: 8 })
    const { events } = await part({ ...options, steps: 16, resume: true })
    expect(of(events, 'best')).toEqual([16])
    expect(folders(out)).toEqual(['checkpoint-16'])
    const plain = await part({ ...options, out: `${out}-off`, steps: 8, keepBest: false })
    expect(of(plain.events, 'checkpoint')).toEqual([8])
    expect(of(plain.events, 'best')).toEqual([])
  })

  test('that an abort keeps from its step comes first after resuming; nothing differs from an undisturbed run', async () => {
    const hooks = (stop: AbortController, abortIn?: 'validate' | 'sample'): Partial<ToyOptions> => {
      const hook = (name: string, step: number): void => {
        if (name !== abortIn || step !== 6) return
        stop.abort()
        throw new Error('stopped')
      }
      return {
        steps: 9,
        checkpointEvery: 4,
        validateEvery: 3,
        sampleEvery: 3,
        signal: stop.signal,
        validate: async (step) => {
          hook('validate', step)
          return { loss: step === 6 ? 0.1 : 1 / step }
        },
        sample: async (step, dir) => {
          hook('sample', step)
          writeFileSync(join(dir, 'a.txt'), '')
          return []
        },
      }
    }
    const out = join(folder, 'hooks')
    const whole = await part({ ...hooks(new AbortController()), out: `${out}-whole` })
    for (const name of ['validate', 'sample'] as const) {
      const own = `${out}-${name}`
      const first = await part({ ...hooks(new AbortController(), name), out: own })
      expect(first.error).toMatchObject({ code: 'ERR_ABORTED' })
      expect(first.events.at(-1)).toMatchObject({ type: 'checkpoint', step: 6 })
      const second = await part({ ...hooks(new AbortController()), out: own, resume: true })
      expect(second.lines).toEqual(whole.lines)
      expect(second.hash).toBe(whole.hash)
      expect(await bestCheckpoint(own)).toMatchObject({ step: 6, validation: 0.1, updates: 6 })
      expect(folders(own)).toEqual(folders(`${out}-whole`))
    }
  })
})

describe('samples', () => {
  const options = { steps: 4, sampleEvery: 2 }

  test('appear in a folder of their own when all of them are written', async () => {
    const out = join(folder, 'samples')
    const seen: string[][] = []
    const { events } = await part({
      ...options,
      out,
      sample: async (step, dir) => {
        seen.push(readdirSync(out).filter((name) => name.startsWith('samples')))
        mkdirSync(join(dir, 'grid'))
        writeFileSync(join(dir, 'grid', 'a.txt'), `${step}`)
        return [join(dir, 'grid', 'a.txt')]
      },
    })
    expect(seen).toEqual([[], ['samples-2']])
    const files = events.flatMap((e) => (e.type === 'samples' ? e.files : []))
    expect(files).toEqual([2, 4].map((step) => join(out, `samples-${step}`, 'grid', 'a.txt')))
    expect(files.map((file) => readFileSync(file, 'utf8'))).toEqual(['2', '4'])
  })

  test('that fail end the run with their error and leave no folder', async () => {
    const out = join(folder, 'samples-fail')
    const { error } = await part({
      ...options,
      out,
      sample: async (_, dir) => {
        writeFileSync(join(dir, 'half.txt'), '')
        throw new Error('no brush')
      },
    })
    expect(String(error)).toContain('no brush')
    expect(readdirSync(out)).toEqual(['metrics.jsonl'])
  })
})

describe('a loss or gradient that is not finite', () => {
  const at =
    (what: 'loss' | 'gradient', ...steps: number[]) =>
    (step: number): 'loss' | 'gradient' | undefined =>
      steps.includes(step) ? what : undefined

  test('is skipped with the name of what is wrong: the loss, or the parameter whose gradient it is', async () => {
    const out = join(folder, 'skip')
    const { events, lines } = await part({
      out,
      steps: 6,
      accumulate: 2,
      bad: (step, micro) => (step === 1 && micro === 1 ? 'loss' : at('gradient', 3)(step)),
    })
    expect(of(events, 'skipped')).toEqual([2, 4])
    const [loss, gradient] = events.filter((e) => e.type === 'skipped')
    expect(loss).toEqual({ type: 'skipped', step: 2, loss: Number.NaN, culprit: 'loss' })
    expect(gradient).toMatchObject({ step: 4, loss: 0, culprit: 'in.bias' })
    expect(lines.map(({ type, step }) => [type, step])).toEqual(
      events.flatMap(({ type, step }) => (type === 'checkpoint' ? [] : [[type, step]])),
    )
    expect(await latestCheckpoint(out)).toMatchObject({ step: 6, updates: 4 })
  })

  test('leaves every bit of the weights, moments and averages as they were', async () => {
    const one = await part({ out: join(folder, 'left-1'), steps: 3, companions: {} })
    for (const what of ['loss', 'gradient'] as const) {
      // The companion learns from the data of every step, so only the optimizer of the run is compared.
      const out = join(folder, `left-${what}`)
      await part({ out, steps: 5, companions: {}, bad: at(what, 3, 4) })
      const state = (dir: string, step: number): Buffer =>
        readFileSync(join(dir, `checkpoint-${step}`, 'optimizer.safetensors'))
      expect(state(out, 5).equals(state(join(folder, 'left-1'), 3)), what).toBe(true)
    }
    expect(one.events).toHaveLength(4)
  })

  test('ends the run at the limit of bad steps in a row, and the count outlives an interrupt', async () => {
    const bad = at('loss', 1, 2, 4, 5, 6)
    const straight = await part({ out: join(folder, 'limit'), bad, nonFinite: { limit: 3 } })
    expect(straight.error).toMatchObject({
      code: 'ERR_NUMERICS',
      message: expect.stringMatching(/step 7: loss NaN.*3 times in a row.*finite loss.*learning rate/),
    })
    expect(of(straight.events, 'skipped')).toEqual([2, 3, 5, 6])
    const out = join(folder, 'limit-resume')
    const options = { out, bad, nonFinite: { limit: 3 }, checkpointEvery: 1 }
    await part(options, (event) => event.type === 'checkpoint' && event.step === 6)
    const resumed = await part({ ...options, resume: true })
    expect(resumed.error).toMatchObject({ message: (straight.error as Error).message })
  })

  test('ends the run at once when asked to, naming step and culprit', async () => {
    const options = { out: join(folder, 'fail'), nonFinite: { policy: 'fail' } as const }
    const { events, error } = await part({ ...options, bad: at('gradient', 2) })
    expect(of(events, 'step')).toEqual([1, 2])
    expect(error).toMatchObject({
      code: 'ERR_NUMERICS',
      message: expect.stringMatching(/step 3.*finite in\.bias/),
    })
  })

  test('puts the weights back to the last checkpoint when asked to, goes on with the next data, and so after any interrupt', async () => {
    const options = {
      steps: 12,
      checkpointEvery: 4,
      nonFinite: { policy: 'rollback' } as const,
      bad: at('gradient', 2, 6, 9),
    }
    const out = join(folder, 'back')
    const whole = await part({ ...options, out })
    expect(whole.error).toBeUndefined()
    const back = whole.events.flatMap((e) => (e.type === 'rollback' ? [[e.step, e.to, e.culprit]] : []))
    expect(back).toEqual([
      [3, 0, 'in.bias'],
      [7, 4, 'in.bias'],
      [10, 8, 'in.bias'],
    ])
    expect(of(whole.events, 'step')).toEqual([1, 2, 4, 5, 6, 8, 9, 11, 12])
    // One update of step 4, then those of 8, of 11 and 12: the others went with the rollbacks.
    expect(await latestCheckpoint(out)).toMatchObject({ step: 12, updates: 4 })
    for (let cut = 0; cut < whole.events.length; cut++) {
      const own = `${out}-${cut}`
      let seen = 0
      await part({ ...options, out: own }, () => seen++ === cut)
      const rest = await part({ ...options, out: own, resume: true })
      expect(rest.hash, `left after event ${cut}`).toBe(whole.hash)
      expect(rest.lines, `left after event ${cut}`).toEqual(whole.lines)
    }
  })

  test('ends a run that only ever rolls back, also when it saves after every step', async () => {
    for (const checkpointEvery of [1, 100]) {
      const out = join(folder, `back-limit-${checkpointEvery}`)
      const { events, error } = await part({
        ...{ out, steps: 50, checkpointEvery, nonFinite: { policy: 'rollback', limit: 4 } },
        bad: (step) => (step > 2 ? 'loss' : undefined),
      })
      expect(error).toMatchObject({ code: 'ERR_NUMERICS', message: expect.stringMatching(/step 7.*4 times/) })
      expect(of(events, 'rollback')).toEqual([4, 5, 6])
    }
  })

  test('is not the only thing to be skipped: so is a loss above maxLoss', async () => {
    const size = (step: number): number => (step === 2 ? 50 : 1)
    const options = { steps: 5, size, maxLoss: 20 }
    const { events } = await part({ ...options, out: join(folder, 'max') })
    expect(of(events, 'skipped')).toEqual([3])
    const skipped = events.find((e) => e.type === 'skipped')
    expect(skipped).toEqual({ type: 'skipped', step: 3, loss: expect.any(Number) })
    const { error } = await part({ ...options, size: () => 50, out: join(folder, 'max-all') })
    expect(error).toMatchObject({
      code: 'ERR_NUMERICS',
      message: expect.stringContaining('below 20 (maxLoss)'),
    })
  })
})

describe('a run', () => {
  test('that begins refuses a folder with checkpoints of another one, and touches nothing there', async () => {
    const out = join(folder, 'old')
    await part({ out, steps: 2 })
    const before = readdirSync(out).map((name) => [name, readFileSync(join(out, 'metrics.jsonl'), 'utf8')])
    const { error } = await part({ out, steps: 4 })
    expect(error).toMatchObject({ code: 'ERR_OPTION', message: expect.stringMatching(/step 2.*Resume/) })
    expect(readdirSync(out).map((name) => [name, readFileSync(join(out, 'metrics.jsonl'), 'utf8')])).toEqual(
      before,
    )
  })

  test('cuts off what a killed one noted behind its checkpoint, and half a line', async () => {
    const out = join(folder, 'torn')
    const whole = await part({ out: `${out}-whole`, steps: 6, checkpointEvery: 2 })
    await part({ out, steps: 6, checkpointEvery: 2 }, (event) => event.step === 5)
    const path = join(out, 'metrics.jsonl')
    writeFileSync(path, `${readFileSync(path, 'utf8')}{"type":"step","step":6,"lo`)
    const rest = await part({ out, steps: 6, checkpointEvery: 2, resume: true })
    expect(of(rest.events, 'resume')).toEqual([4])
    expect(rest.lines).toEqual(whole.lines)
    expect(rest.hash).toBe(whole.hash)
  })

  test('removes what a killed one left half written or half removed, and nothing else', async () => {
    const out = join(folder, 'remains')
    await part({ out, steps: 2 })
    const remains = ['.checkpoint-4.77-ab.tmp', 'checkpoint-1.tmp', '.samples-2.7-a.tmp', '.loss.svg.1-f.tmp']
    for (const name of [...remains, 'checkpoint-mine', '.mine.tmp']) mkdirSync(join(out, name))
    writeFileSync(join(out, 'checkpoint-2', '.state.json.1-a.tmp'), '')
    await part({ out, steps: 3, resume: true })
    expect(readdirSync(out).sort()).toEqual(
      ['.mine.tmp', 'checkpoint-2', 'checkpoint-3', 'checkpoint-mine', 'loss.svg', 'metrics.jsonl'].sort(),
    )
    expect(readdirSync(join(out, 'checkpoint-2'))).not.toContain('.state.json.1-a.tmp')
  })

  test('names a checkpoint whose state cannot be read, and what to do about it', async () => {
    const out = join(folder, 'unreadable')
    await part({ out, steps: 2 })
    writeFileSync(join(out, 'checkpoint-2', 'state.json'), '{"step":')
    const { error } = await part({ out, steps: 4, resume: true })
    expect(error).toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringMatching(/checkpoint-2.*Remove this checkpoint/),
    })
  })

  test('refuses settings that mean nothing, each by its name', async () => {
    const wrong: [Partial<ToyOptions>, string][] = [
      [{ accumulate: 0 }, 'accumulate'],
      [{ accumulate: 1.5 }, 'accumulate'],
      [{ keepCheckpoints: 0 }, 'keepCheckpoints'],
      [{ checkpointEvery: -1 }, 'checkpointEvery'],
      [{ validateEvery: 2 }, 'validate, validateEvery'],
      [{ sample: async () => [] }, 'sample, sampleEvery'],
      [{ nonFinite: { policy: 'hope' as 'skip' } }, 'nonFinite.policy'],
      [{ nonFinite: { limit: 0 } }, 'nonFinite.limit'],
      [{ maxLoss: 0 }, 'maxLoss'],
    ]
    for (const [options, what] of wrong) {
      const toy = new ToyRun({ out: join(folder, 'wrong'), ...options })
      const message = expect.stringContaining(what)
      await expect(collect(toy.run()), what).rejects.toMatchObject({ code: 'ERR_OPTION', message })
      toy.dispose()
    }
    expect(readdirSync(folder)).not.toContain('wrong')
  })
})
