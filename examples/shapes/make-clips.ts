import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { writeFileAtomically } from '../../lib/io/atomic.ts'
import { encodeMp4 } from '../../lib/io/video.ts'
import { caption, FPS, makeRng, randomSpec, renderClip, type Shape, SIZE, type Split } from './world.ts'

const usage =
  'Usage: node dist/examples/shapes/make-clips.js --out DIR --count N [--seed S] [--split train|heldout|all]'

export interface MakeClipsOptions {
  out: string
  count: number
  seed?: number
  split?: Split
  /** How many times as often as others a shape is drawn. */
  often?: Partial<Record<Shape, number>>
  signal?: AbortSignal
  onClip?: (done: number) => void
}

/**
 * Writes `count` mp4 clips of the toy world and their `captions.jsonl` into `out`. Clip `i` depends on seed, `often` and
 * `i` only, so a larger set with the same seed starts with the smaller one.
 *
 * @returns the path of the captions
 */
export async function makeClips(options: MakeClipsOptions): Promise<string> {
  const { out, count, seed = 1, split = 'train', often, signal, onClip } = options
  await mkdir(out, { recursive: true })
  const lines: string[] = new Array(count)
  let next = 0
  let done = 0
  const worker = async (): Promise<void> => {
    for (let i = next++; i < count; i = next++) {
      const spec = randomSpec(makeRng(seed * 1_000_003 + i), split, often)
      const video = `clip-${String(i).padStart(5, '0')}.mp4`
      await encodeMp4(join(out, video), renderClip(spec), {
        width: SIZE,
        height: SIZE,
        fps: FPS,
        ...(signal ? { signal } : {}),
      })
      lines[i] = JSON.stringify({ video, text: caption(spec), ...spec })
      onClip?.(++done)
    }
  }
  // Two children at a time: one encodes while the next clip is drawn.
  await Promise.all([worker(), worker()])
  const captions = join(out, 'captions.jsonl')
  await writeFileAtomically(captions, `${lines.join('\n')}\n`)
  return captions
}

async function main(): Promise<number> {
  let values: { out?: string; count?: string; seed?: string; split?: string }
  try {
    const string = { type: 'string' } as const
    values = parseArgs({ options: { out: string, count: string, seed: string, split: string } }).values
  } catch (error) {
    console.error(`${(error as Error).message}\n${usage}`)
    return 2
  }
  const count = Number(values.count)
  const seed = Number(values.seed ?? 1)
  const split = values.split ?? 'train'
  const known = ['train', 'heldout', 'all'].includes(split)
  if (!values.out || !Number.isInteger(count) || count < 1 || !Number.isSafeInteger(seed) || !known) {
    console.error(usage)
    return 2
  }
  try {
    const started = performance.now()
    const onClip = (done: number): void => {
      if (done % 200 === 0 || done === count) console.error(`${done} of ${count} clips`)
    }
    console.log(await makeClips({ out: values.out, count, seed, split: split as Split, onClip }))
    console.error(`in ${((performance.now() - started) / 1000).toFixed(1)} s`)
    return 0
  } catch (error) {
    console.error((error as Error).message)
    return 1
  }
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  main().then((code) => {
    process.exitCode = code
  })
}
