import { cpSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test, vi } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { openWeights, type TensorToWrite, writeSafetensors } from '../lib/io/safetensors.ts'
import { defaultNegativePrompt, promptSuffix } from '../lib/models/presets.ts'
import { gelu } from '../lib/ops/pointwise.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import type { TextEncoder, TextFeatures } from '../lib/text/encoder.ts'
import { LazyPromptEncoder } from '../lib/text/lazy-encoder.ts'
import { loadTextEncoder } from '../lib/text/load.ts'
import { PromptEncoder } from '../lib/text/prompt-encoder.ts'
import { PromptNetworks } from '../lib/text/prompt-networks.ts'
import { PromptTokenizers } from '../lib/text/prompt-tokenizers.ts'
import { relativeBucket } from '../lib/text/t5-encoder.ts'
import { TextTokenizer } from '../lib/text/tokenizer.ts'
import { writePipeline } from './fixtures/tiny.ts'
import {
  CLIP_VOCAB,
  T5_PIECES,
  t5Definition,
  writeClipTokenizer,
  writeT5Tokenizer,
} from './fixtures/tokenizers.ts'
import { goldenFolder, relativeL2 } from './golden.ts'

const folder = mkdtempSync(join(tmpdir(), 'pyraflow-text-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** A copy of the recorded networks of a variant, with small tokenizers beside them. */
function modelFolder(variant: 'flux' | 'sd3'): string {
  const dir = mkdtempSync(join(folder, `${variant}-`))
  cpSync(join(goldenFolder, 'models', variant === 'flux' ? 'flux_a' : 'mmdit_a'), dir, { recursive: true })
  writeClipTokenizer(join(dir, 'tokenizer'))
  if (variant === 'sd3') writeClipTokenizer(join(dir, 'tokenizer_2'), { pad: '!', length: 512 })
  writeT5Tokenizer(join(dir, variant === 'flux' ? 'tokenizer_2' : 'tokenizer_3'))
  return dir
}

function editJson(path: string, change: (json: Record<string, unknown>) => void): void {
  const json = JSON.parse(readFileSync(path, 'utf8'))
  change(json)
  writeFileSync(path, JSON.stringify(json))
}

const dispose = ({ embeds, pooled }: TextFeatures): void => {
  embeds.dispose()
  pooled.dispose()
}

async function valuesOf(features: TextFeatures): Promise<{ embeds: Float32Array; pooled: Float32Array }> {
  const values = { embeds: await features.embeds.floats(), pooled: await features.pooled.floats() }
  dispose(features)
  return values
}

const t5 = () => new TextTokenizer('t5', t5Definition(), {})
const pieces = (ids: readonly number[]): string[] => ids.map((id) => T5_PIECES[id] as string)

describe('a T5 tokenizer', () => {
  test('takes the likeliest pieces, ends with </s> and pads on the right', () => {
    const { ids, mask, cut } = t5().encode('a  red Fox', 8)
    // The vocabulary has no capital F.
    expect(pieces(ids)).toEqual(['▁a', '▁red', '▁', '<unk>', 'o', 'x', '</s>', '<pad>'])
    expect(mask).toEqual([1, 1, 1, 1, 1, 1, 1, 0])
    expect(cut).toBe('')
  })

  test('makes the null condition of the empty prompt', () => {
    expect(t5().encode('', 4)).toEqual({ ids: [1, 0, 0, 0], mask: [1, 0, 0, 0], cut: '' })
  })

  test('cuts what is too long, keeps the end mark and tells what was cut', () => {
    const { ids, mask, cut } = t5().encode('a red fox red fox', 4)
    expect(pieces(ids)).toEqual(['▁a', '▁red', '▁fox', '</s>'])
    expect(mask).toEqual([1, 1, 1, 1])
    expect(cut).toBe('red fox')
    expect(t5().encode('a red fox', 4).cut).toBe('')
  })

  test('refuses a length without room for the end mark, and what is no string', () => {
    expect(() => t5().encode('a', 0)).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
    expect(() => t5().encode(7 as unknown as string, 8)).toThrow(/number/)
  })
})

describe('a CLIP tokenizer', () => {
  const dir = join(folder, 'clip')
  const padded = join(folder, 'clip-g')
  writeClipTokenizer(dir)
  writeClipTokenizer(padded, { pad: '!' })
  const clip = TextTokenizer.fromPretrained(dir, 'clip')
  const names = Object.fromEntries(Object.entries(CLIP_VOCAB).map(([token, id]) => [id, token]))
  const tokens = (prompt: string, tokenizer = clip): (string | undefined)[] =>
    tokenizer.encode(prompt, 24).ids.map((id) => names[id])

  test('lower-cases, merges and splits into words, single digits and contractions', () => {
    const end = '<|endoftext|>'
    const words = ['red</w>', 'fox</w>', "'s</w>", '4</w>', '2</w>', ',</w>', '-', '-</w>', 'a</w>']
    expect(tokens("RED\n fox's 42, --a")).toEqual(['<|startoftext|>', ...words, ...new Array(14).fill(end)])
  })

  test('keeps both marks when it cuts', () => {
    const { ids, mask, cut } = clip.encode('red fox red fox', 4)
    expect(ids).toEqual([88, CLIP_VOCAB['red</w>'], CLIP_VOCAB['fox</w>'], 89])
    expect(mask).toEqual([1, 1, 1, 1])
    expect(cut).toBe('red fox')
  })

  test('pads with what its files say, and never splits that token', () => {
    const g = TextTokenizer.fromPretrained(padded, 'clip')
    expect(g.encode('red!', 6).ids).toEqual([88, CLIP_VOCAB['red</w>'], 0, 89, 0, 0])
    expect(clip.encode('red!', 6).ids).toEqual([88, CLIP_VOCAB['red</w>'], CLIP_VOCAB['!</w>'], 89, 89, 89])
    expect(clip.encode('', 3).ids).toEqual([88, 89, 89])
    expect([clip.maxLength, clip.encode('', 3).mask]).toEqual([77, [1, 1, 0]])
  })

  test('reads a tokenizer.json where there is one', () => {
    const whole = join(folder, 'clip-json')
    cpSync(dir, whole, { recursive: true })
    writeFileSync(join(whole, 'tokenizer.json'), JSON.stringify({ ...t5Definition(), added_tokens: [] }))
    // These pieces have no <|startoftext|>.
    expect(() => TextTokenizer.fromPretrained(whole, 'clip')).toThrow(/startoftext/)
  })
})

describe('tokenizers of a model folder', () => {
  test('warn once a prompt and network of what was cut', () => {
    const dir = modelFolder('sd3')
    const warnings: string[] = []
    const long = `${'red '.repeat(75)}fox`
    const tokens = PromptTokenizers.fromPretrained(dir).encode([long, 'red', ''], (m) => warnings.push(m))
    expect(warnings).toEqual([
      'The prompt is longer than 77 tokens; CLIP 1 does not see "fox"',
      'The prompt is longer than 77 tokens; CLIP 2 does not see "fox"',
    ])
    expect(tokens.t5.ids.map((row) => row.length)).toEqual([128, 128, 128])
    // The first tokenizer's length counts for both.
    expect(tokens.clip.map((rows) => rows.map((row) => row.length))).toEqual([
      [77, 77, 77],
      [77, 77, 77],
    ])
    expect(tokens.t5.mask.map((row) => row.filter(Boolean).length)).toEqual([77, 2, 1])
    warnings.length = 0
    PromptTokenizers.fromPretrained(dir).encode([`${'red '.repeat(127)}a fox`], (m) => warnings.push(m))
    expect(warnings[0]).toBe('The prompt is longer than 128 tokens; T5 does not see "a fox"')
  })

  test('make shorter T5 rows than the published ones where a model says so', () => {
    const dir = modelFolder('flux')
    const path = join(dir, 'tokenizer_2', 'tokenizer_config.json')
    const config = JSON.parse(readFileSync(path, 'utf8'))
    writeFileSync(path, JSON.stringify({ ...config, model_max_length: 3 }))
    const warnings: string[] = []
    const { t5 } = PromptTokenizers.fromPretrained(dir).encode(['a red fox', ''], (m) => warnings.push(m))
    expect(t5.mask).toEqual([
      [1, 1, 1],
      [1, 0, 0],
    ])
    expect(warnings).toEqual(['The prompt is longer than 3 tokens; T5 does not see "fox"'])
    expect(new LazyPromptEncoder(dir, { cache: false }).maxLength).toBe(3)
  })

  test.each([
    ['vocab.json', 'tokenizer'],
    ['merges.txt', 'tokenizer'],
    ['tokenizer.json', 'tokenizer_2'],
  ])('without %s are an error that names it', async (name, part) => {
    const dir = modelFolder('flux')
    rmSync(join(dir, part, name))
    const error = { code: 'ERR_IO', message: expect.stringContaining(join(part, name)) }
    await expect(loadTextEncoder(dir)).rejects.toMatchObject(error)
  })

  test.each<[string, string, string, RegExp]>([
    ['a list for a vocabulary', 'tokenizer/vocab.json', '[]', /vocab\.json/],
    ['merges of three', 'tokenizer/merges.txt', 'a b c\n', /merges\.txt.*a b c/],
    ['no merges', 'tokenizer/merges.txt', '#version: 0.2\n', /merges\.txt/],
    ['a vocabulary without marks', 'tokenizer/vocab.json', '{"a":0}', /startoftext|endoftext/],
    ['an object that is no tokenizer', 'tokenizer_2/tokenizer.json', '{}', /tokenizer_2/],
    ['cut-off JSON', 'tokenizer_2/tokenizer.json', '{"model":', /tokenizer\.json/],
  ])('with %s are ERR_CHECKPOINT', async (_, path, content, message) => {
    const dir = modelFolder('flux')
    writeFileSync(join(dir, path), content)
    if (content === '{"a":0}')
      editJson(join(dir, 'tokenizer/tokenizer_config.json'), (c) => delete c.added_tokens_decoder)
    await expect(loadTextEncoder(dir)).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringMatching(message),
    })
  })

  test('that make longer rows than CLIP has places for are refused', async () => {
    const dir = modelFolder('flux')
    writeClipTokenizer(join(dir, 'tokenizer'), { length: 78 })
    await expect(loadTextEncoder(dir)).rejects.toThrow(/at most 77 tokens, received 1, of 78/)
  })
})

describe('the text encoder of a model folder', () => {
  test.each([
    ['flux', 24],
    ['sd3', 24],
  ] as const)('%s: every row is computed for itself, and everything is freed', async (variant, pooledDim) => {
    await engine.idle()
    const before = engine.memory().live
    const encoder = await loadTextEncoder(modelFolder(variant))
    expect([encoder.jointDim, encoder.pooledDim, encoder.maxLength]).toEqual([32, pooledDim, 128])
    const both = await encoder.encode(['a red fox', ''])
    expect([both.embeds.shape, both.pooled.shape]).toEqual([
      [2, 128, 32],
      [2, pooledDim],
    ])
    expect(both.mask.map((row) => row.filter(Boolean).length)).toEqual([4, 1])
    const [all, one, none] = [
      await valuesOf(both),
      await valuesOf(await encoder.encode(['a red fox'])),
      await valuesOf(await encoder.encode([''])),
    ]
    expect(relativeL2(one.embeds, all.embeds.subarray(0, 128 * 32))).toBeLessThan(1e-6)
    expect(relativeL2(none.embeds, all.embeds.subarray(128 * 32))).toBeLessThan(1e-6)
    expect(relativeL2(one.pooled, all.pooled.subarray(0, pooledDim))).toBeLessThan(1e-6)
    expect(relativeL2(one.pooled, none.pooled)).toBeGreaterThan(0.1)
    encoder.dispose?.()
    await engine.idle()
    expect(engine.memory().live).toBe(before)
  })

  test('of a toy model is its word encoder', async () => {
    const dir = join(folder, 'toy')
    await writePipeline(dir)
    const { embeds, pooled, mask } = await (await loadTextEncoder(dir)).encode(['a red circle'])
    expect([embeds.shape, mask]).toEqual([[1, 6, 12], [[1, 1, 1, 1, 0, 0]]])
    dispose({ embeds, pooled, mask })
  })

  test('warns through the process unless told otherwise', async () => {
    const dir = modelFolder('flux')
    const long = 'red '.repeat(80)
    const emitted = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined)
    const warned: string[] = []
    for (const options of [{}, { onWarning: (m: string) => void warned.push(m) }]) {
      const encoder = await PromptEncoder.fromPretrained(dir, options)
      encoder.tokenize([long])
      encoder.dispose()
    }
    expect(emitted.mock.calls).toEqual([[warned[0], 'PyraflowWarning']])
    expect(warned).toEqual([expect.stringContaining('CLIP does not see "red red')])
    emitted.mockRestore()
  })

  test('in bf16 is near the one in f32', async () => {
    const dir = modelFolder('sd3')
    const results = []
    for (const dtype of ['f32', 'bf16'] as const) {
      const encoder = await loadTextEncoder(dir, { dtype })
      const features = await encoder.encode(['a red fox'])
      expect(features.embeds.dtype).toBe(dtype)
      results.push(await valuesOf(features))
      encoder.dispose?.()
    }
    expect(relativeL2(results[1]?.embeds ?? [], results[0]?.embeds ?? [])).toBeLessThan(2e-2)
    expect(relativeL2(results[1]?.pooled ?? [], results[0]?.pooled ?? [])).toBeLessThan(2e-2)
  })

  test('stops when aborted, and keeps nothing', async () => {
    const encoder = await loadTextEncoder(modelFolder('flux'))
    await engine.idle()
    const before = engine.memory().live
    const controller = new AbortController()
    const running = encoder.encode(['red'], { signal: controller.signal })
    controller.abort()
    await expect(running).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    await expect(encoder.encode(['red'], { signal: controller.signal })).rejects.toMatchObject({
      code: 'ERR_ABORTED',
    })
    await engine.idle()
    expect(engine.memory().live).toBe(before)
    await expect(encoder.encode([])).rejects.toMatchObject({ code: 'ERR_OPTION' })
    encoder.dispose?.()
  })

  test('of another width than the transformer is refused', async () => {
    const dir = modelFolder('flux')
    const dit = join(dir, 'diffusion_transformer_384p')
    rmSync(dit, { recursive: true })
    const toy = join(folder, 'toy-dit')
    await writePipeline(toy)
    cpSync(join(toy, 'diffusion_transformer'), dit, { recursive: true })
    await expect(Pipeline.load(dir)).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringMatching(/12 and 12.*32 and 24/),
    })
  })

  test('gives the pipeline its prompt suffix and negative prompt', async () => {
    const pipe = await Pipeline.load(modelFolder('flux'), { promptCache: false })
    const encode = vi.spyOn(pipe.text as Required<TextEncoder>, 'encodeEach')
    // In letters, as the small tokenizers read them, the negative prompt is too long.
    const emitted = vi.spyOn(process, 'emitWarning').mockImplementation(() => undefined)
    const small = {
      width: 64,
      height: 64,
      allowUntrained: true,
      frames: 1,
      steps: [1, 1, 1],
      videoSteps: [1, 1, 1],
    }
    const video = await pipe.generate({ prompt: 'a red fox', ...small }).result()
    expect(encode.mock.calls.map(([prompts]) => prompts)).toEqual([
      [`a red fox${promptSuffix}`, defaultNegativePrompt],
    ])
    expect(video.recipe).toMatchObject({ prompt: 'a red fox', negativePrompt: defaultNegativePrompt })
    expect(video.frames.length).toBe(64 * 64 * 3)

    // pyraflow.json may know better.
    encode.mockClear()
    const config = { ...pipe.config, promptSuffix: '!', negativePrompt: '' }
    const own = await new Pipeline({ ...pipe, config }).generate({ prompt: 'red', ...small }).result()
    expect(own.recipe.negativePrompt).toBe('')
    expect(encode.mock.calls.map(([prompts]) => prompts)).toEqual([['red!', '']])
    pipe.dispose()
    encode.mockRestore()
    emitted.mockRestore()
    await expect(pipe.text.encode(['a'])).rejects.toMatchObject({ code: 'ERR_OPTION' })
  })
})

describe('a folder with the wrong networks', () => {
  test('a missing shard is named', async () => {
    const dir = modelFolder('flux')
    rmSync(join(dir, 'text_encoder_2', 'model-00002-of-00002.safetensors'))
    await expect(loadTextEncoder(dir)).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining('model-00002-of-00002.safetensors'),
    })
  })

  test.each<[string, (dir: string) => void, string, RegExp]>([
    ['encoders that changed places', swapEncoders, 'ERR_CHECKPOINT', /text_encoder/],
    ['no T5', (d) => rmSync(join(d, 'text_encoder_2'), { recursive: true }), 'ERR_IO', /text_encoder_2/],
    ['nothing at all', (d) => rmSync(join(d, 'text_encoder'), { recursive: true }), 'ERR_IO', /text_encoder/],
    [
      'a T5 of version 1.0',
      (d) => edit(d, '_2', { feed_forward_proj: 'relu' }),
      'ERR_CHECKPOINT',
      /feed_forward_proj/,
    ],
    [
      'other position buckets',
      (d) => edit(d, '_2', { relative_attention_num_buckets: 16 }),
      'ERR_CHECKPOINT',
      /buckets/,
    ],
    ['a width that no weight has', (d) => edit(d, '_2', { d_ff: 41 }), 'ERR_CHECKPOINT', /wi_0/],
    [
      'fewer layers than weights',
      (d) => edit(d, '', { num_hidden_layers: 1 }),
      'ERR_CHECKPOINT',
      /another model/,
    ],
    [
      'heads that do not divide',
      (d) => edit(d, '', { num_attention_heads: 5 }),
      'ERR_CHECKPOINT',
      /num_attention_heads/,
    ],
    [
      'an unknown activation',
      (d) => edit(d, '', { hidden_act: 'relu' }),
      'ERR_CHECKPOINT',
      /hidden_act.*quick_gelu/,
    ],
    ['a missing size', (d) => edit(d, '', { vocab_size: undefined }), 'ERR_CHECKPOINT', /vocab_size/],
  ])('%s', async (_, spoil, code, message) => {
    const dir = modelFolder('flux')
    spoil(dir)
    await expect(loadTextEncoder(dir)).rejects.toMatchObject({
      code,
      message: expect.stringMatching(message),
    })
  })

  function edit(dir: string, suffix: string, fields: Record<string, unknown>): void {
    editJson(join(dir, `text_encoder${suffix}`, 'config.json'), (c) => Object.assign(c, fields))
  }

  function swapEncoders(dir: string): void {
    renameSync(join(dir, 'text_encoder'), join(dir, 'x'))
    renameSync(join(dir, 'text_encoder_2'), join(dir, 'text_encoder'))
    renameSync(join(dir, 'x'), join(dir, 'text_encoder_2'))
  }
})

describe('text networks', () => {
  const tokens = {
    t5: { ids: [[5, 1, 0]], mask: [[1, 1, 0]] },
    clip: [[[88, 5, 89, 7]]],
  }

  test('find the end of the text by id or, in old configs, as the largest id', async () => {
    const dir = modelFolder('flux')
    const old = await PromptNetworks.fromPretrained(dir)
    editJson(join(dir, 'text_encoder', 'config.json'), (c) => Object.assign(c, { eos_token_id: 89 }))
    const named = await PromptNetworks.fromPretrained(dir)
    const [a, b] = [await valuesOf(await old.forward(tokens)), await valuesOf(await named.forward(tokens))]
    expect(relativeL2(a.pooled, b.pooled)).toBe(0)
    // Nothing after the end is seen.
    const other = { ...tokens, clip: [[[88, 5, 89, 8]]] }
    expect(relativeL2(a.pooled, (await valuesOf(await named.forward(other))).pooled)).toBe(0)
    await expect(named.forward({ ...tokens, clip: [[[88, 5, 7, 7]]] })).rejects.toThrow(/end mark 89/)
    old.dispose()
    named.dispose()
  })

  test('take the token table under either of its names', async () => {
    const dir = modelFolder('flux')
    const before = await PromptNetworks.fromPretrained(dir)
    const expected = await valuesOf(await before.forward(tokens))
    before.dispose()
    const target = join(dir, 'text_encoder_2')
    const shards = openWeights(target)
    const all = [...shards.entries].map(
      ([name, { shape }]): TensorToWrite => ({
        name: name === 'shared.weight' ? 'encoder.embed_tokens.weight' : name,
        dtype: 'F32',
        shape: [...shape],
        data: shards.readFloats(name),
      }),
    )
    await writeSafetensors(join(target, 'model.safetensors'), all)
    const after = await PromptNetworks.fromPretrained(dir)
    expect((await valuesOf(await after.forward(tokens))).embeds).toEqual(expected.embeds)
    after.dispose()
  })

  test('refuse tokens that do not fit', async () => {
    const networks = await PromptNetworks.fromPretrained(modelFolder('flux'))
    const bad: [object, string, RegExp][] = [
      [{ t5: { ids: [[120, 1, 0]], mask: [[1, 1, 0]] } }, 'ERR_OPTION', /0 to 119, received 120/],
      [{ t5: { ids: [[5, 1, 0]], mask: [[0, 0, 0]] } }, 'ERR_SHAPE', /mask/],
      [{ t5: { ids: [[5, 1, 0], [1]], mask: [[1, 1, 0], [1]] } }, 'ERR_SHAPE', /one length/],
      [{ clip: [[[90, 89]]] }, 'ERR_OPTION', /CLIP/],
      [{ clip: [[new Array<number>(78).fill(89)]] }, 'ERR_SHAPE', /at most 77/],
      [{ clip: [] }, 'ERR_SHAPE', /CLIP/],
    ]
    for (const [change, code, message] of bad) {
      const error = { code, message: expect.stringMatching(message) }
      await expect(networks.forward({ ...tokens, ...change })).rejects.toMatchObject(error)
    }
    networks.dispose()
  })
})

test('position buckets are those of the formula, boundaries included', () => {
  // trunc(ln(a/8)/ln 16·8) ≥ m exactly when a⁸ ≥ 8⁸·16ᵐ.
  const far = (a: bigint): number => {
    let m = 0
    while (m < 7 && a ** 8n >= 8n ** 8n * 16n ** BigInt(m + 1)) m++
    return 8 + m
  }
  for (let delta = -200; delta <= 200; delta++) {
    const a = Math.abs(delta)
    const expected = (delta > 0 ? 16 : 0) + (a < 8 ? a : far(BigInt(a)))
    expect([delta, relativeBucket(delta)]).toEqual([delta, expected])
  }
})

test('gelu is x·Φ(x)', async () => {
  const xs = Array.from({ length: 241 }, (_, i) => (i - 120) / 20)
  // erf as its power series, which converges everywhere.
  const erf = (z: number): number => {
    let term = z
    let total = z
    for (let n = 1; n < 200; n++) {
      term *= (-z * z) / n
      total += term / (2 * n + 1)
    }
    return (2 / Math.sqrt(Math.PI)) * total
  }
  const x = Tensor.from(Float32Array.from(xs))
  const y = gelu(x)
  const values = await y.floats()
  for (const [i, v] of xs.entries()) {
    expect(Math.abs((values[i] as number) - (v / 2) * (1 + erf(v / Math.SQRT2)))).toBeLessThan(1e-6)
  }
  x.dispose()
  y.dispose()
})
