import { createHash } from 'node:crypto'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { latestCheckpoint } from '../lib/train/run.ts'
import { compiledPath, runChild, startChild } from './fixtures/compiled.ts'
import { numbers } from './fixtures/tiny.ts'
import { killRun, noted } from './fixtures/toy-run.ts'

// In memory where that is possible: processes die here, no disks.
const folder = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'run-kill-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const fileHash = (path: string): string => createHash('sha256').update(readFileSync(path)).digest('hex')

/** Every checkpoint that has its name is whole. */
function expectComplete(out: string, parts: readonly string[], when: string): void {
  for (const name of existsSync(out) ? readdirSync(out) : []) {
    if (!/^checkpoint-\d+$/.test(name)) continue
    for (const file of ['state.json', 'optimizer.safetensors', ...parts])
      expect(existsSync(join(out, name, file)), `${when}: ${name}/${file}`).toBe(true)
  }
}

describe('a training process', () => {
  const STEPS = 24
  const KILLS = 50
  const options = JSON.stringify({ accumulate: 2, checkpointEvery: 2 })
  const results = (out: string): unknown => {
    const last = join(out, `checkpoint-${STEPS}`)
    return {
      lines: noted(out),
      weights: fileHash(join(last, 'diffusion_transformer', 'diffusion_pytorch_model.safetensors')),
      state: fileHash(join(last, 'optimizer.safetensors')),
      names: readdirSync(out).sort(),
    }
  }

  test(`killed at ${KILLS} random moments ends, each time resumed, with every loss and weight of an undisturbed one`, async () => {
    const start = (name: string, env: Record<string, string> = {}, data = 'data') =>
      startChild('child-train', [join(folder, data), join(folder, name), String(STEPS), options], {
        env,
        node: ['--import', compiledPath('kill-at')],
      })
    expect((await start('whole').exit).code).toBe(0)
    const expected = results(join(folder, 'whole'))

    const seed = Number(process.env.PYRAFLOW_KILL_SEED ?? 1 + Math.floor(Math.random() * 1e6))
    // Most die at a file system call, as many of them are in saves; one in five at some time after it began.
    const moments = Array.from(numbers(KILLS, seed), (x, i) => {
      const share = (x + 1) / 2
      return i % 5 === 0 ? { ms: Math.round(300 * share) } : { call: 1 + Math.floor(400 * share) }
    })
    console.log(`PYRAFLOW_KILL_SEED=${seed} kills at ${JSON.stringify(moments)}`)
    let [kills, resumed, finished] = [0, 0, 0]
    // One life after another in its own folder until it finishes; then a new one begins. Two at a time: there are cores.
    const lane = async (lane: string): Promise<void> => {
      for (let life = 0; kills < KILLS; life++) {
        const name = `${lane}-${life}`
        const out = join(folder, name)
        for (let over = false; !over; ) {
          const moment = moments[kills++]
          const call: Record<string, string> =
            moment && 'call' in moment ? { KILL_AT: String(moment.call), KILL_UNDER: out } : {}
          const child = start(name, call, `data-${lane}`)
          if (moment && 'ms' in moment) {
            await child.line((line) => line === 'begin')
            await Promise.race([child.exit, new Promise((resolve) => setTimeout(resolve, moment.ms))])
            child.process.kill('SIGKILL')
          }
          const { stderr } = await child.exit
          if (child.lines.some((line) => line.startsWith('resume'))) resumed++
          const when = `seed ${seed}, ${JSON.stringify(moment)}`
          expectComplete(out, ['diffusion_transformer/config.json'], when)
          over = child.lines.at(-1) === 'finished'
          if (!moment) expect(over, `${when}: ${child.lines.join('\n')}\n${stderr}`).toBe(true)
        }
        finished++
        expect(results(out), `seed ${seed}, ${name}`).toEqual(expected)
      }
    }
    await Promise.all([lane('a'), lane('b')])
    console.log(`${KILLS} kills in ${finished} runs of ${STEPS} steps, ${resumed} processes resumed`)
    expect(kills).toBeGreaterThanOrEqual(KILLS)
    expect(resumed).toBeGreaterThan(KILLS / 3)
  }, 600_000)

  test('saves on the first interrupt; a second one during saving leaves no half checkpoint', async () => {
    const data = join(folder, 'signal-data')
    const gentle = startChild('child-train', [data, join(folder, 'signal-once'), '1000'])
    await gentle.line((line) => line.startsWith('step 3'))
    gentle.process.kill('SIGINT')
    expect((await gentle.exit).code).toBe(0)
    expect(gentle.lines.at(-1)).toBe('ended ERR_ABORTED')
    const step = Number(gentle.lines.findLast((line) => line.startsWith('step'))!.split(' ')[1])
    expect((await latestCheckpoint(join(folder, 'signal-once')))?.step).toBe(step)

    const out = join(folder, 'signal-twice')
    const hasty = startChild('child-train', [data, out, '1000'])
    await hasty.line((line) => line.startsWith('step 3'))
    hasty.process.kill('SIGINT')
    await hasty.line((line) => line === 'stopping')
    hasty.process.kill('SIGINT')
    const { code } = await hasty.exit
    expect([0, 130]).toContain(code)
    const found = await latestCheckpoint(out)
    expect(found!.step).toBeGreaterThanOrEqual(2)
    const model = await PyramidFluxTransformer.fromPretrained(join(found!.path, 'diffusion_transformer'))
    model.dispose()
  })
})

describe('a save', () => {
  const STEPS = 12
  const POINTS = 200

  test('ended before any single file system call, or within a write, is no checkpoint or a whole one', async () => {
    const out = join(folder, 'toy-whole')
    const toy = killRun(out, STEPS)
    for await (const _ of toy.run());
    const whole = { hash: await toy.hash(), names: readdirSync(out).sort(), lines: noted(out) }
    toy.dispose()
    const expected: unknown = JSON.parse(JSON.stringify(whole).replaceAll(out, ''))

    const lines = await runChild('child-run', [join(folder, 'lives'), String(STEPS), String(POINTS)])
    const runs = lines.filter((line) => line.startsWith('{')).map((line) => JSON.parse(line))
    for (const { run, ...found } of runs) expect(found, `run ${run}`).toEqual(expected)
    const saved = lines.filter((line) => !line.startsWith('{'))
    const parts =
      'beside-optimizer.safetensors,model,model/config.json,model/diffusion_pytorch_model.safetensors,'
    for (const line of saved) expect(line).toContain(` ${parts}optimizer.safetensors,plain.txt,state.json`)
    console.log(
      `${POINTS - runs.length} interrupted lives of ${runs.length} whole runs, ${saved.length} checkpoints seen between them`,
    )
    expect(runs.length).toBeGreaterThan(5)
  }, 240_000)
})
