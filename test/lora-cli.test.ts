import { spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { latentNormalisation } from '../lib/models/presets.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import type { ImmediateTextEncoder } from '../lib/text/encoder.ts'
import { FineTune } from '../lib/train/fine-tune.ts'
import { LatentDataset } from '../lib/train/latents.ts'
import { CachedTextEncoder, encodeTexts } from '../lib/train/text-cache.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { compiled } from './fixtures/compiled.ts'
import { live } from './fixtures/memory.ts'
import { tinyLatents, writePipeline } from './fixtures/tiny.ts'
import { writeClipTokenizer, writeT5Tokenizer } from './fixtures/tokenizers.ts'
import { goldenFolder } from './golden.ts'

const folder = mkdtempSync(join(tmpdir(), 'lora-cli-'))
const model = join(folder, 'model')
const data = join(folder, 'data')
const small = join(folder, 'small')
// Each starts several processes, which take a second alone and many beside other work.
const MINUTES = 300_000
let main: string

beforeAll(async () => {
  main = compiled('lib/cli/main.js')
  await writePipeline(model)
  for (const [dir, count] of [
    [data, 6],
    [small, 1],
  ] as const)
    (await tinyLatents(dir, { count })).dispose()
}, 120_000)
afterAll(() => rmSync(folder, { recursive: true, force: true }))

function run(args: string[]) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args], {
    encoding: 'utf8',
    cwd: folder,
  })
  return { status, stdout, stderr }
}
const train = (...args: string[]) =>
  run([
    'train',
    '--init',
    model,
    '--batch-size',
    '4',
    '--steps',
    '2',
    '--warmup-steps',
    '0',
    '--progress',
    'none',
    ...args,
  ])
const generate = (out: string, ...args: string[]) =>
  run([
    'generate',
    '--out',
    out,
    '--prompt',
    'a red circle',
    '--frames',
    '1',
    '--json',
    '--progress',
    'none',
    ...args,
  ])
const json = (text: string) => JSON.parse(text)

describe('train --init with a whole model folder', () => {
  test(
    'gives a folder that generate loads, with the constants, text and VAE of the first',
    () => {
      const { status, stdout, stderr } = train('--data', data, '--out', 'full')
      expect(stderr).toBe('')
      expect(status).toBe(0)
      const made = join('full', 'model')
      expect(stdout.trim()).toBe(made)
      for (const name of ['pyraflow.json', 'causal_video_vae/config.json', 'text_encoder/config.json'])
        expect(readFileSync(join(folder, made, name)), name).toEqual(readFileSync(join(model, name)))
      const weights = 'diffusion_transformer/diffusion_pytorch_model.safetensors'
      expect(readFileSync(join(folder, made, weights)).equals(readFileSync(join(model, weights)))).toBe(false)
      const first = generate('full.png', '--model', made)
      expect(first.stderr).not.toMatch(/warning/)
      expect(first.status).toBe(0)
      // A run that is done writes its folder again.
      expect(train('--data', data, '--out', 'full', '--resume').status).toBe(0)
    },
    MINUTES,
  )

  test(
    'trains adapters, which generate, inspect and merge take',
    () => {
      const made = train(
        '--data',
        data,
        '--out',
        'lora',
        '--lora-rank',
        '2',
        '--lora-alpha',
        '4',
        '--lora-targets',
        'to_q,ff.net.2',
        '--json',
      )
      expect(made.stderr).toBe('')
      const { model: adapter } = json(made.stdout)
      expect(adapter).toBe(join('lora', 'adapter.safetensors'))

      const [found] = json(run(['lora', 'inspect', adapter, '--model', model, '--json']).stdout).adapters
      expect(found).toMatchObject({ layers: 3, ranks: [2], alphas: [4], fits: 'yes' })
      expect(json(found.metadata.recipe)).toMatchObject({ clips: 6, steps: 2, batchSize: 4 })
      expect(run(['lora', 'inspect', adapter]).stdout).toMatch(
        /adapter\.safetensors: 3 layers, rank 2, alpha 4/,
      )

      const { status, stdout } = generate(
        'lora.png',
        '--model',
        model,
        '--lora',
        `${adapter}:0.5`,
        '--lora',
        adapter,
      )
      expect(status).toBe(0)
      expect(json(stdout).recipe.adapters).toMatchObject([
        { path: adapter, scale: 0.5, hash: found.hash },
        { path: adapter, scale: 1 },
      ])

      const merged = run(['lora', 'merge', '--model', model, '--lora', `${adapter}:2`, '--out', 'merged'])
      expect(merged.stdout.trim()).toBe('merged')
      expect(generate('merged.png', '--model', 'merged').status).toBe(0)
      expect(run(['lora', 'merge', '--model', model, '--lora', adapter, '--out', 'merged'])).toMatchObject({
        status: 1,
      })
    },
    MINUTES,
  )

  test(
    'has a preset for one clip, whose settings can be changed',
    () => {
      const dry = (...args: string[]) =>
        json(
          run([
            'train',
            '--init',
            model,
            '--data',
            small,
            '--out',
            'one',
            '--preset',
            'one-clip',
            '--dry-run',
            ...args,
          ]).stdout,
        )
      expect(dry()).toMatchObject({ steps: 200, batchSize: 4, loraRank: 8, learningRate: 2e-4 })
      expect(dry()).not.toHaveProperty('validateEvery')
      expect(dry('--validation', data)).toMatchObject({ validateEvery: 20 })
      expect(dry('--steps', '7', '--lora-rank', '3')).toMatchObject({ steps: 7, loraRank: 3, batchSize: 4 })
      const made = train('--data', small, '--out', 'one', '--preset', 'one-clip')
      expect(made.stderr).toMatch(/no --validation clips/)
      expect(made.status).toBe(0)
      expect(existsSync(join(folder, 'one', 'adapter.safetensors'))).toBe(true)
    },
    MINUTES,
  )

  test(
    'says what does not go together',
    () => {
      const cases: [string[], RegExp][] = [
        [['--lora-alpha', '3'], /--lora-alpha needs --lora-rank/],
        [['--lora-rank', '3', '--lora-targets', 'to_x'], /to_x/],
        [['--preset', 'two-clips'], /one-clip/],
        [['--variant', '768p'], /variant/],
      ]
      for (const [args, message] of cases) {
        const { status, stderr } = train('--data', data, '--out', 'wrong', ...args)
        expect(stderr).toMatch(message)
        expect(status).not.toBe(0)
      }
      expect(run(['lora', 'merge', '--model', model, '--out', 'x'])).toMatchObject({
        status: 2,
        stderr: expect.stringMatching(/missing --lora/),
      })
      expect(run(['lora', 'inspect', join(model, 'pyraflow.json')]).status).toBe(1)
    },
    MINUTES,
  )
})

describe('a fine-tune', () => {
  test('takes stages, units and constants from the folder, and of a published one from its variant', async () => {
    const before = await live()
    const tune = await FineTune.open(model, { dtype: 'f32' })
    expect(tune.normalisation).toEqual(json(readFileSync(join(model, 'pyraflow.json'), 'utf8')).normalisation)
    const cache = await LatentDataset.open(data)
    const parts = tune.parts(cache)
    expect(parts.data.normalisation).toEqual(tune.normalisation)
    expect(cache.normalisation).not.toEqual(tune.normalisation)
    expect(parts.data.captions).toEqual(cache.captions)
    // Without adapters nothing is left of the weights that clips could be kept with.
    expect(() => tune.parts(cache, {}, () => true)).toThrow(/keeps.*lora/)
    tune.dispose()
    const adapted = await FineTune.open(model, { dtype: 'f32', lora: { rank: 2 } })
    const { teacher, model: network } = adapted.parts(cache, {}, (i) => i > 0)
    expect(teacher?.network).not.toBe(network)
    expect([0, 1].map((i) => teacher?.clips(i))).toEqual([false, true])
    adapted.dispose()
    cache.dispose()

    const published = join(folder, 'published')
    cpSync(join(goldenFolder, 'models/mmdit_a'), published, { recursive: true })
    writeClipTokenizer(join(published, 'tokenizer'))
    writeClipTokenizer(join(published, 'tokenizer_2'), { pad: '!', length: 512 })
    writeT5Tokenizer(join(published, 'tokenizer_3'))
    await expect(FineTune.open(published)).rejects.toMatchObject({
      code: 'ERR_OPTION',
      message: expect.stringMatching(/Cache the features/),
    })
    const text: ImmediateTextEncoder = {
      ...{ jointDim: 32, pooledDim: 24, maxLength: 3 },
      encode: (prompts) => ({
        embeds: Tensor.zeros([prompts.length, 3, 32]),
        mask: prompts.map(() => [1, 1, 1]),
        pooled: Tensor.zeros([prompts.length, 24]),
      }),
    }
    const own = await FineTune.open(published, { text, dtype: 'f32', lora: { rank: 1 } })
    expect(own.normalisation).toEqual(latentNormalisation.mmdit)
    expect(own.stages.count).toBe(3)
    own.dispose()
    await expect(FineTune.open(published, { text, lora: { rank: 0 } })).rejects.toMatchObject({
      code: 'ERR_OPTION',
    })
    await expect(FineTune.open(join(model, 'causal_video_vae'))).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
    })
    expect(await live()).toBe(before)
  })

  test('of all weights of a published folder gives one that loads, from cached text', async () => {
    const published = join(folder, 'flux')
    cpSync(join(goldenFolder, 'models/flux_a'), published, { recursive: true })
    writeClipTokenizer(join(published, 'tokenizer'))
    writeT5Tokenizer(join(published, 'tokenizer_2'))
    const cache = await LatentDataset.open(data)
    await encodeTexts(published, cache.captions, join(folder, 'texts'))
    const text = await CachedTextEncoder.open(join(folder, 'texts'))
    const tune = await FineTune.open(published, { text, dtype: 'f32' })
    const trainer = new Trainer({
      ...tune.parts(cache),
      ...{ out: join(folder, 'published-run'), steps: 1, batchSize: 4, warmupSteps: 0, captionDrop: 0.5 },
    })
    for await (const _ of trainer.run()) void _
    const out = await tune.save(trainer, join(folder, 'published-model'))
    await expect(tune.save(trainer, out)).rejects.toMatchObject({ code: 'ERR_IO' })
    for (const thing of [trainer, tune, text, cache]) thing.dispose()
    const pipe = await Pipeline.load(out)
    expect(pipe.source?.variant).toBe('diffusion_transformer_384p')
    expect(pipe.config.normalisation).toEqual(latentNormalisation.flux)
    pipe.dispose()
  })
})
