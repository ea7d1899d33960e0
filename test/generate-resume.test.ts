import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { GenerateEvent, GenerateOptions, Video } from '../lib/index.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { compiledPath, startChild } from './fixtures/compiled.ts'
import { live } from './fixtures/memory.ts'
import { withTinyPipeline } from './fixtures/pipeline.ts'
import { numbers } from './fixtures/tiny.ts'

let pipe: Pipeline
const folder = withTinyPipeline('resume', (loaded) => {
  pipe = loaded
})
const OPTIONS: GenerateOptions = { prompt: 'a red circle', frames: 33, seed: 4 }
const FILE = 'video-0.latents.safetensors'

const make = (options: GenerateOptions): Promise<Video> => pipe.generate(options).result()

/** Generates until `stop` says so of an event, or to the end; what happened, and what it threw. */
async function until(
  options: GenerateOptions,
  stop: (event: GenerateEvent) => boolean = () => false,
): Promise<{ steps: number; first: number[]; warnings: string[]; error?: unknown; video?: Video }> {
  const abort = new AbortController()
  const seen = { steps: 0, first: [] as number[], warnings: [] as string[] }
  const generation = pipe.generate({ ...options, signal: abort.signal })
  try {
    for await (const event of generation) {
      if (event.type === 'progress') seen.steps++
      if (event.type === 'frames') seen.first.push(event.first)
      if (event.type === 'warning') seen.warnings.push(event.message)
      if (stop(event)) abort.abort()
    }
    return { ...seen, video: await generation.result() }
  } catch (error) {
    return { ...seen, error }
  }
}

const inUnit =
  (unit: number) =>
  (event: GenerateEvent): boolean =>
    event.type === 'progress' && event.unit === unit

describe('an interrupted generation', () => {
  test('goes on behind its last finished unit, to the same bits', async () => {
    const whole = await until(OPTIONS)
    const expected = whole.video as Video
    const before = await live()
    const resume = join(folder, 'same')
    const begun = await until({ ...OPTIONS, resume }, inUnit(3))
    expect(begun.error).toMatchObject({ code: 'ERR_ABORTED' })
    expect(readdirSync(resume)).toEqual([FILE])
    const rest = await until({ ...OPTIONS, resume })
    expect(rest.first).toEqual(whole.first)
    expect(rest.first).toEqual([0, 1, 9, 17, 25])
    // Six steps of the first unit, three of each other; two of them are left.
    expect([whole.steps, rest.steps]).toEqual([18, 6])
    for (const { frames, latents, recipe } of [rest.video as Video]) {
      expect(Buffer.compare(frames, expected.frames)).toBe(0)
      expect(latents).toEqual(expected.latents)
      expect(recipe).toEqual(expected.recipe)
    }
    const again = await until({ ...OPTIONS, resume })
    expect([again.steps, again.first]).toEqual([0, whole.first])
    expect(again.video?.frames).toEqual(expected.frames)
    expect(await live()).toBe(before)
    // What is kept is what saving with latents writes.
    const longer = await make({
      prompt: 'a red circle',
      seed: 4,
      continueFrom: join(resume, FILE),
      frames: 8,
    })
    expect(longer.frames).toEqual((await make({ ...OPTIONS, frames: 41 })).frames)
  })

  test('tells how far it is', async () => {
    const resume = join(folder, 'progress')
    await until(
      { ...OPTIONS, resume, videosPerPrompt: 2 },
      (event) => event.type === 'progress' && event.done === 22,
    )
    expect(readdirSync(resume)).toHaveLength(1)
    await until(
      { ...OPTIONS, resume, videosPerPrompt: 2 },
      (event) => event.type === 'progress' && event.done === 26,
    )
    expect(readdirSync(resume).sort()).toEqual([FILE, FILE.replace('0', '1')])
    const seen: number[] = []
    for await (const event of pipe.generate({ ...OPTIONS, resume, videosPerPrompt: 2 })) {
      if (event.type !== 'progress') continue
      expect(event).toMatchObject({ total: 36, video: 1 })
      expect(event.etaMs).toBeGreaterThanOrEqual(0)
      seen.push(event.done)
    }
    expect(seen).toEqual(Array.from({ length: 12 }, (_, i) => 25 + i))
  })

  test('may have begun with an image, with another video, with units of several latent frames', async () => {
    const image = {
      data: Uint8Array.from(numbers(64 * 64 * 3, 2), (x) => 128 + 100 * x),
      width: 64,
      height: 64,
    }
    const earlier = await make({ ...OPTIONS, frames: 9 })
    for (const [i, more] of [{ image }, { continueFrom: earlier }].entries()) {
      const options = { ...OPTIONS, ...more, frames: 17 }
      const resume = join(folder, `given-${i}`)
      const whole = await until(options)
      expect((await until({ ...options, resume }, inUnit(i === 0 ? 2 : 3))).error).toBeDefined()
      const rest = await until({ ...options, resume })
      expect([rest.steps, rest.first]).toEqual([whole.steps - 3, whole.first])
      expect(rest.video?.frames).toEqual(whole.video?.frames)
    }
    const { transformer, vae, text, config } = pipe
    const fine = pipe
    pipe = new Pipeline({ transformer, vae, text, config: { ...config, framesPerUnit: 2 } })
    try {
      const resume = join(folder, 'coarse')
      const whole = await until(OPTIONS)
      await until({ ...OPTIONS, resume }, inUnit(2))
      const rest = await until({ ...OPTIONS, resume })
      expect([whole.first, rest.first, rest.steps]).toEqual([[0, 1, 17], [0, 1, 17], 3])
      expect(rest.video?.frames).toEqual(whole.video?.frames)
    } finally {
      pipe = fine
    }
  })

  test('is not taken for another one', async () => {
    const resume = join(folder, 'other')
    await until({ ...OPTIONS, resume }, inUnit(2))
    const kept = readFileSync(join(resume, FILE))
    const refused = async (options: GenerateOptions, message: RegExp): Promise<void> => {
      await expect(make({ ...OPTIONS, resume, ...options })).rejects.toMatchObject({
        code: 'ERR_CHECKPOINT',
        message: expect.stringMatching(message),
      })
    }
    await refused({ seed: 5 }, /seed: expected 5, .* received 4\. .*choose another folder/)
    await refused({ prompt: 'a blue square' }, /prompt: expected "a blue square"/)
    await refused({ guidance: (unit) => 3 - unit }, /guidance: expected \[3,2,1,0,-1\].* received nothing/)
    expect(readFileSync(join(resume, FILE)).equals(kept)).toBe(true)
    // How decoding is cut does not matter to latents.
    expect((await until({ ...OPTIONS, resume, maxMemory: 1e9 })).steps).toBe(9)
    truncateSync(join(resume, FILE), 100)
    await refused({}, /video-0/)
    rmSync(join(resume, FILE))
    writeFileSync(join(resume, FILE), 'not one')
    await refused({}, /video-0/)
  })

  test('that nothing can be kept of is made all the same, and says so', async () => {
    const file = join(folder, 'a-file')
    writeFileSync(file, '')
    const { video, warnings } = await until({ ...OPTIONS, frames: 9, resume: join(file, 'below') })
    expect(warnings).toHaveLength(2)
    expect(warnings[0]).toMatch(/could not be kept: writing .* failed/)
    expect(video?.frames).toEqual((await make({ ...OPTIONS, frames: 9 })).frames)
    expect(() => pipe.resolve({ ...OPTIONS, resume: '' })).toThrow(/resume: expected the path of a folder/)
  })

  test('survives kills at any moment', async () => {
    const expected = createHash('sha256')
      .update((await make(OPTIONS)).frames)
      .digest('hex')
    const seed = Number(process.env.PYRAFLOW_KILL_SEED ?? 1 + Math.floor(Math.random() * 1e6))
    const moments = Array.from(numbers(12, seed), (x) => 1 + Math.floor(14 * (x + 1)))
    console.log(`PYRAFLOW_KILL_SEED=${seed} kills at file system calls ${moments}`)
    let [kills, steps] = [0, 0]
    for (let life = 0; kills < moments.length; life++) {
      const resume = join(folder, `killed-${life}`)
      for (;;) {
        const at = moments[kills] ?? 1e9
        const env = { KILL_AT: String(at), KILL_UNDER: resume }
        const child = startChild('child-resume', [join(folder, 'model'), resume], {
          env,
          node: ['--import', compiledPath('kill-at')],
        })
        const { signal, stderr } = await child.exit
        steps += child.lines.filter((line) => line === 'step').length
        if (existsSync(resume)) {
          const names = readdirSync(resume).filter((name) => !name.startsWith('.'))
          expect([[], [FILE]]).toContainEqual(names)
        }
        if (signal === 'SIGKILL') {
          kills++
          continue
        }
        expect(child.lines.at(-1), stderr).toBe(`finished ${expected}`)
        expect(readdirSync(resume)).toEqual([FILE])
        break
      }
    }
    console.log(`${kills} kills, ${steps} steps in all`)
    expect(kills).toBeGreaterThanOrEqual(moments.length)
  }, 120_000)
})
