import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import type { TextFeatures } from '../lib/text/encoder.ts'
import { PromptEncoder } from '../lib/text/prompt-encoder.ts'
import { CachedTextEncoder, encodeTexts } from '../lib/train/text-cache.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { tinyDit, tinyLatents, tinyText } from './fixtures/tiny.ts'
import { writeClipTokenizer, writeT5Tokenizer } from './fixtures/tokenizers.ts'
import { goldenFolder } from './golden.ts'
import { live } from './gradcheck.ts'

const root = mkdtempSync(join(tmpdir(), 'pyraflow-texts-'))
afterAll(() => rmSync(root, { recursive: true, force: true }))

/** A copy of the recorded networks of a variant, with small tokenizers beside them. */
function modelFolder(variant: 'flux' | 'sd3'): string {
  const dir = mkdtempSync(join(root, `${variant}-`))
  cpSync(join(goldenFolder, 'models', variant === 'flux' ? 'flux_a' : 'mmdit_a'), dir, { recursive: true })
  writeClipTokenizer(join(dir, 'tokenizer'))
  if (variant === 'sd3') writeClipTokenizer(join(dir, 'tokenizer_2'), { pad: '!', length: 512 })
  writeT5Tokenizer(join(dir, variant === 'flux' ? 'tokenizer_2' : 'tokenizer_3'))
  return dir
}

async function valuesOf({ embeds, mask, pooled }: TextFeatures) {
  const values = {
    shapes: [embeds.shape, pooled.shape],
    dtypes: [embeds.dtype, pooled.dtype],
    mask,
    embeds: await embeds.floats(),
    pooled: await pooled.floats(),
  }
  embeds.dispose()
  pooled.dispose()
  return values
}

const CAPTIONS = ['a red fox', 'a fox', 'a red fox', 'red', 'fox red']
const shardsIn = (dir: string): string[] => readdirSync(join(dir, 'shards')).sort()

describe('the text cache', () => {
  for (const [variant, dtype] of [
    ['flux', 'f32'],
    ['flux', 'bf16'],
    ['sd3', 'bf16'],
  ] as const) {
    test(`of the ${variant} networks in ${dtype} gives the features that they give`, async () => {
      const model = modelFolder(variant)
      const out = join(root, `${variant}-${dtype}`)
      const progress: string[] = []
      const onProgress = (done: number, total: number): void => void progress.push(`${done}/${total}`)
      const done = await encodeTexts(model, CAPTIONS, out, { dtype, onProgress })
      expect(done).toMatchObject({ texts: 5, encoded: 5, reused: 0 })
      expect(progress).toEqual(['5/5'])
      const cached = await CachedTextEncoder.open(out)
      const real = await PromptEncoder.fromPretrained(model, { dtype })
      expect([cached.jointDim, cached.pooledDim, cached.maxLength]).toEqual([
        real.jointDim,
        real.pooledDim,
        real.maxLength,
      ])
      for (const prompts of [[''], ['a fox'], ['fox red', '', 'a red fox', '']]) {
        const [found, expected] = [cached.encode(prompts), await real.encode(prompts)]
        expect(await valuesOf(found), prompts.join()).toEqual(await valuesOf(expected))
      }
      cached.dispose()
      real.dispose()
      expect(await live()).toBe(0)
    })
  }

  test('of a word encoder trains as the encoder does', async () => {
    const model = join(root, 'words')
    await tinyText().save(join(model, 'text_encoder'))
    const data = await tinyLatents(join(root, 'word-latents'))
    const out = join(root, 'word-texts')
    await encodeTexts(model, data.captions, out)
    const cached = await CachedTextEncoder.open(out)
    const losses: number[][] = []
    for (const text of [tinyText(), cached]) {
      const dit = tinyDit({ train: true })
      const options = { batchSize: 4, steps: 3, seed: 4, captionDrop: 0.5, learningRate: 1e-3 }
      const trainer = new Trainer({ model: dit, data, text, out: join(root, 'word-run'), ...options })
      const found: number[] = []
      for await (const event of trainer.run()) if (event.type === 'step') found.push(event.loss)
      losses.push(found)
      trainer.dispose()
      dit.dispose()
      rmSync(join(root, 'word-run'), { recursive: true })
    }
    expect(losses[0]).toHaveLength(3)
    expect(losses[1]).toEqual(losses[0])
    cached.dispose()
    data.dispose()
  })

  test('adds what is missing, and starts anew for another encoder', async () => {
    const model = join(root, 'more-words')
    await tinyText().save(join(model, 'text_encoder'))
    const out = join(root, 'more-texts')
    expect(await encodeTexts(model, ['a red circle'], out)).toMatchObject({ texts: 2, encoded: 2 })
    const more = ['a blue square', 'a red circle']
    expect(await encodeTexts(model, more, out)).toMatchObject({ texts: 3, encoded: 1, reused: 2 })
    const fresh = join(root, 'fresh-texts')
    await encodeTexts(model, more, fresh)
    expect(shardsIn(out)).toEqual(shardsIn(fresh))
    for (const name of ['index.jsonl', join('shards', shardsIn(out)[0] as string)]) {
      expect(readFileSync(join(out, name)), name).toEqual(readFileSync(join(fresh, name)))
    }
    const config = join(model, 'text_encoder', 'config.json')
    writeFileSync(config, readFileSync(config, 'utf8').replace('"seed": 7', '"seed": 8'))
    expect(await encodeTexts(model, more, out)).toMatchObject({ texts: 3, encoded: 3, reused: 0 })
    expect(shardsIn(out)).toHaveLength(1)
  })

  test('goes on where an abort left it', async () => {
    const model = join(root, 'abort-words')
    await tinyText().save(join(model, 'text_encoder'))
    const words = 'a red blue circle square moving left right on black background'.split(' ')
    const many = words.flatMap((a) => words.slice(0, 6).map((b) => `${a} ${b}`))
    const out = join(root, 'abort-texts')
    const stop = new AbortController()
    const aborted = encodeTexts(model, many, out, { signal: stop.signal, onProgress: () => stop.abort() })
    await expect(aborted).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    expect(existsSync(join(out, 'index.jsonl'))).toBe(false)
    await expect(CachedTextEncoder.open(out)).rejects.toMatchObject({ code: 'ERR_IO' })
    expect(await encodeTexts(model, many, out)).toMatchObject({ texts: 67, encoded: 35, reused: 32 })
    expect(shardsIn(out)).toHaveLength(1)
  })

  test('refuses a text that it does not hold, and a folder that is no text cache', async () => {
    const model = join(root, 'refuse-words')
    await tinyText().save(join(model, 'text_encoder'))
    const out = join(root, 'refuse-texts')
    await encodeTexts(model, ['a red circle'], out)
    const cached = await CachedTextEncoder.open(out)
    expect(() => cached.encode(['a blue square'])).toThrow(
      expect.objectContaining({
        code: 'ERR_OPTION',
        message: expect.stringMatching(/"a blue square".*pyraflow encode --text-encoder/),
      }),
    )
    expect(() => cached.encode([])).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
    cached.dispose()
    await expect(encodeTexts(model, ['a green circle'], out)).rejects.toMatchObject({
      code: 'ERR_OPTION',
      message: expect.stringContaining('green'),
    })
    ;(await tinyLatents(join(root, 'refuse-latents'))).dispose()
    await expect(CachedTextEncoder.open(join(root, 'refuse-latents'))).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
    })
    expect(await live()).toBe(0)
  })
})
