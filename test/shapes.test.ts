import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { type ClipScore, scoreClip } from '../examples/shapes/scorer.ts'
import { TEXT_SEED, writeTextEncoders } from '../examples/shapes/text-encoders.ts'
import {
  BACKGROUND_NAMES,
  type ClipSpec,
  COLOUR_NAMES,
  COLOURS,
  caption,
  combinations,
  FPS,
  FRAMES,
  isHeldOut,
  MOTIONS,
  makeRng,
  randomSpec,
  renderClip,
  SHAPES,
  SIZE,
  VOCABULARY,
} from '../examples/shapes/world.ts'
import { decodeVideo, encodeMp4, hasFfmpeg } from '../lib/io/video.ts'
import { shuffle } from '../lib/tensor/shuffle.ts'
import { PromptEncoder } from '../lib/text/prompt-encoder.ts'
import { PromptTokenizers } from '../lib/text/prompt-tokenizers.ts'
import { relativeL2 } from './golden.ts'

const attributes = ['colour', 'shape', 'motion', 'background'] as const
const size = { width: SIZE, height: SIZE, count: FRAMES }

function specs(n: number, seed: number): ClipSpec[] {
  const rng = makeRng(seed)
  return Array.from({ length: n }, () => randomSpec(rng, 'all'))
}

/** Share of clips read correctly, per attribute. */
function agreement(truth: readonly ClipSpec[], read: readonly ClipScore[]): Record<string, number> {
  return Object.fromEntries(
    attributes.map((name) => [
      name,
      truth.filter((spec, i) => spec[name] === read[i][name]).length / truth.length,
    ]),
  )
}

function expectAtLeast(rates: Record<string, number>, bound: number): void {
  for (const name of attributes) expect(rates[name], name).toBeGreaterThanOrEqual(bound)
}

/** Mean over 4×4 blocks written back to every pixel of the block: about what a small decoder loses. */
function boxBlur(frames: Uint8Array, cell = 4): Uint8Array {
  const out = new Uint8Array(frames.length)
  const row = SIZE * 3
  for (let t = 0; t < FRAMES; ++t) {
    for (let y = 0; y < SIZE; y += cell) {
      for (let x = 0; x < SIZE; x += cell) {
        const at = t * SIZE * row + y * row + x * 3
        for (let c = 0; c < 3; ++c) {
          let sum = 0
          for (let k = 0; k < cell * cell; ++k)
            sum += frames[at + Math.floor(k / cell) * row + (k % cell) * 3 + c]
          for (let k = 0; k < cell * cell; ++k) {
            out[at + Math.floor(k / cell) * row + (k % cell) * 3 + c] = sum / cell ** 2
          }
        }
      }
    }
  }
  return out
}

const folders: string[] = []
afterAll(() => Promise.all(folders.map((folder) => rm(folder, { recursive: true, force: true }))))

describe('the toy world', () => {
  const truth = specs(200, 11)
  const clips = truth.map(renderClip)
  const read = clips.map((frames) => scoreClip(frames, size))

  test('is read back by the scorer from ground truth in at least 99 % of clips for every attribute', () => {
    expectAtLeast(agreement(truth, read), 0.99)
  })

  test('is read back in at least 97 % of clips after a 4×4 box blur', () => {
    const some = truth.slice(0, 100)
    expectAtLeast(
      agreement(
        some,
        clips.slice(0, 100).map((frames) => scoreClip(boxBlur(frames), size)),
      ),
      0.97,
    )
  })

  test('may get another colour, which the scorer then reads as well as the others', () => {
    const palette = { ...COLOURS, orange: [232, 132, 40] as const }
    const rng = makeRng(77)
    for (let i = 0; i < 20; i++) {
      const drawn = randomSpec(rng, 'all')
      const spec = i % 2 ? { ...drawn, colour: 'orange', rgb: palette.orange } : drawn
      const verdict = scoreClip(boxBlur(renderClip(spec)), size, palette)
      expect(verdict.colour, caption(spec)).toBe(spec.colour)
    }
  })

  test('is read from one picture as well, which stands still', () => {
    const stills = clips.slice(0, 100).map((frames) => {
      const picture = frames.subarray(0, frames.length / FRAMES)
      return scoreClip(picture, { ...size, count: 1 })
    })
    const { colour, shape, background } = agreement(truth.slice(0, 100), stills)
    for (const rate of [colour, shape, background]) expect(rate).toBeGreaterThanOrEqual(0.99)
    expect(new Set(stills.map(({ motion }) => motion))).toEqual(new Set(['still']))
  })

  test('agrees with shuffled captions no better than by chance', () => {
    const order = shuffle(truth.length, 5)
    const rates = agreement(
      truth,
      Array.from(order, (i) => read[i]),
    )
    const chance = { colour: 1 / 6, shape: 1 / 4, motion: 1 / 5, background: 1 / 3 }
    for (const name of attributes) expect(Math.abs(rates[name] - chance[name]), name).toBeLessThan(0.1)
  })

  test('is read back the same after an mp4 round trip', async (context) => {
    if (!(await hasFfmpeg())) return context.skip('ffmpeg is not installed')
    const folder = await mkdtemp(join(tmpdir(), 'pyraflow-shapes-'))
    folders.push(folder)
    const some = truth.slice(0, 6)
    const decoded: ClipScore[] = []
    for (const [i, frames] of clips.slice(0, 6).entries()) {
      const path = join(folder, `${i}.mp4`)
      await encodeMp4(path, frames, { width: SIZE, height: SIZE, fps: FPS })
      const clip = await decodeVideo(path)
      decoded.push(scoreClip(clip.frames, clip))
    }
    expectAtLeast(agreement(some, decoded), 1)
  })

  test('gives an empty picture no colour, shape or motion, and no confidence', () => {
    const verdict = scoreClip(new Uint8Array(FRAMES * SIZE * SIZE * 3).fill(128), size)
    expect(verdict).toEqual({
      colour: 'none',
      shape: 'none',
      motion: 'none',
      background: 'grey',
      confidence: 0,
    })
  })

  test('never trains on a held-out combination and covers every pair of words in training', () => {
    const rng = makeRng(3)
    const seen = new Set<string>()
    for (let i = 0; i < 5000; ++i) {
      const spec = randomSpec(rng, 'train')
      expect(isHeldOut(spec)).toBe(false)
      for (const pair of [
        [spec.colour, spec.shape],
        [spec.colour, spec.motion],
        [spec.shape, spec.motion],
      ]) {
        seen.add(pair.join(' '))
      }
      expect(isHeldOut(randomSpec(rng, 'heldout'))).toBe(true)
    }
    expect(combinations('heldout')).toHaveLength(30)
    expect(combinations('train')).toHaveLength(90)
    expect(seen.size).toBe(6 * 4 + 6 * 5 + 4 * 5)
  })

  test('keeps shapes inside the picture, moves them unmistakably and captions them in its vocabulary', () => {
    for (const [i, spec] of specs(300, 7).entries()) {
      const { radius, x, y, travel, motion } = spec
      const [dx, dy] = { left: [-1, 0], right: [1, 0], up: [0, -1], down: [0, 1], still: [0, 0] }[motion]
      for (const [at, d] of [
        [x, dx],
        [y, dy],
      ]) {
        for (const end of [at, at + d * travel]) {
          expect(end - radius, `clip ${i}`).toBeGreaterThanOrEqual(3.99)
          expect(end + radius, `clip ${i}`).toBeLessThanOrEqual(SIZE - 3.99)
        }
      }
      expect(travel).toBeGreaterThanOrEqual(motion === 'still' ? 0 : SIZE / 5)
      for (const word of caption(spec).split(' ')) expect(VOCABULARY).toContain(word)
    }
    expect(new Set(VOCABULARY).size).toBe(VOCABULARY.length)
    expect(VOCABULARY).toHaveLength(
      5 + COLOUR_NAMES.length + SHAPES.length + MOTIONS.length + BACKGROUND_NAMES.length,
    )
  })

  test('writes captions as whole sentences', () => {
    const spec = { colour: 'red', shape: 'circle', background: 'grey' } as const
    expect(caption({ ...spec, motion: 'right' })).toBe('a red circle moving right on a grey background')
    expect(caption({ ...spec, motion: 'still' })).toBe('a red circle standing still on a grey background')
  })
})

describe('the text encoders of the toy model', () => {
  test('are what the recipe writes, to the last bit', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'pyraflow-shapes-text-'))
    folders.push(folder)
    await writeTextEncoders(folder, TEXT_SEED)
    const parts = (await readdir(folder)).sort()
    expect(parts).toEqual(['text_encoder', 'text_encoder_2', 'tokenizer', 'tokenizer_2'])
    for (const part of parts) {
      for (const name of await readdir(join(folder, part))) {
        const [made, kept] = await Promise.all(
          [folder, 'examples/shapes/model'].map((dir) => readFile(join(dir, part, name))),
        )
        expect(made.equals(kept), join(part, name)).toBe(true)
      }
    }
  })

  test('see every word of a caption as one token, and tell all captions apart', async () => {
    const warnings: string[] = []
    const onWarning = (message: string): number => warnings.push(message)
    const encoder = await PromptEncoder.fromPretrained('examples/shapes/model', { onWarning })
    const all = combinations('all').flatMap((c) =>
      BACKGROUND_NAMES.map((background) => caption({ ...c, background })),
    )
    const { t5, clip } = encoder.tokenize(all)
    // Nine words, and one mark of T5, two of CLIP.
    for (const row of t5.mask) expect(row.filter(Boolean)).toHaveLength(10)
    for (const row of clip[0]) expect(row.indexOf(row.at(-1) as number)).toBe(10)
    expect(warnings).toEqual([])
    // Another word in one place has to show in both features, also in those of the whole text.
    const some = ['red circle moving right', 'blue circle moving right', 'red cross moving right']
    const features = await encoder.encode(
      [...some, 'red circle moving left'].map((s) => `a ${s} on a grey background`),
    )
    for (const tensor of [features.embeds, features.pooled]) {
      const values = await tensor.read()
      const row = values.length / 4
      for (const i of [1, 2, 3]) {
        expect(relativeL2(values.subarray(i * row, (i + 1) * row), values.subarray(0, row))).toBeGreaterThan(
          0.2,
        )
      }
      tensor.dispose()
    }
    encoder.dispose()
  })

  test('spell a word that they do not know', async () => {
    const tokenizers = PromptTokenizers.fromPretrained('examples/shapes/model')
    const { t5, clip } = tokenizers.encode(['zebra', 'orange'], () => undefined)
    expect(t5.mask.map((row) => row.filter(Boolean).length)).toEqual([7, 2])
    // Two letters that a known word begins with are one token of CLIP's: z e br a.
    expect(clip[0].map((row) => row.indexOf(row.at(-1) as number))).toEqual([5, 2])
  })
})
