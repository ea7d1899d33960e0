import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import sharp from 'sharp'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { readRecipe } from '../lib/index.ts'
import { writePipeline } from './fixtures/tiny.ts'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const folder = mkdtempSync(join(tmpdir(), 'examples-'))
const model = join(folder, 'model')

beforeAll(async () => {
  if (!existsSync(join(root, 'dist/lib/index.js'))) throw new Error('run `npm run build:ts` first')
  await writePipeline(model)
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** The examples run as a reader runs them, on a model that is small enough for a test. */
function start(name: string, args: string[]): { child: ChildProcess; ended: Promise<string> } {
  const child = spawn(process.execPath, [join(root, 'examples', name), model, ...args], { cwd: folder })
  let out = ''
  let errors = ''
  child.stdout.on('data', (data) => (out += data))
  child.stderr.on('data', (data) => (errors += data))
  const ended = new Promise<string>((resolve, reject) => {
    child.on('close', (code) =>
      code === 0 ? resolve(out) : reject(new Error(`${name}: ${code}\n${errors}`)),
    )
  })
  return { child, ended }
}

const pages = async (name: string): Promise<number | undefined> =>
  (await sharp(join(folder, name), { animated: true }).metadata()).pages

for (const [name, out, frames] of [
  ['text-to-video.mjs', 'text.webp', 9],
  ['image-to-video.mjs', 'image.webp', 9],
  ['continue.mjs', 'longer.webp', 17],
  ['commonjs.cjs', 'common.webp', 9],
  ['worker.mjs', 'worker.webp', 9],
] as const) {
  test(`${name} makes a video`, async () => {
    const printed = await start(name, [out]).ended
    expect(printed).toContain(name === 'worker.mjs' ? 'frames 1 to 8' : out)
    expect(await pages(out)).toBe(frames)
    expect((await readRecipe(join(folder, out))).prompt).toContain('moving')
  }, 60_000)
}

test('http-stream.mjs sends frames while the video is being made, and says what is wrong with a prompt', async () => {
  const { child, ended } = start('http-stream.mjs', ['0'])
  try {
    const url = await new Promise<string>((resolve, reject) => {
      child.stdout!.on('data', (data) => resolve(String(data).trim()))
      ended.catch(reject)
    })
    const response = await fetch(`${url}?prompt=a+red+circle`)
    expect(response.headers.get('content-type')).toContain('multipart/x-mixed-replace')
    const body = Buffer.from(await response.arrayBuffer()).toString('latin1')
    expect(body.split('content-type: image/jpeg')).toHaveLength(1 + 9)
    const first = body.slice(body.indexOf('\r\n\r\n') + 4)
    expect(await sharp(Buffer.from(first, 'latin1')).metadata()).toMatchObject({ width: 64, height: 64 })
    const refused = await fetch(`${url}?prompt=a+purple+circle`)
    expect(refused.status).toBe(400)
    expect(await refused.text()).toContain('purple')
    // A reader who leaves ends the generation, and the server goes on.
    const leave = new AbortController()
    const left = fetch(`${url}?prompt=a+red+circle`, { signal: leave.signal })
    setTimeout(() => leave.abort(), 20)
    await left.catch(() => undefined)
    expect((await fetch(`${url}?prompt=a+blue+circle`)).status).toBe(200)
  } finally {
    child.kill()
    await ended.catch(() => undefined)
  }
}, 60_000)
