import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import sharp from 'sharp'
import { afterAll, expect, test } from 'vitest'
import { PyraflowError } from '../lib/engine/errors.ts'
import { klLoss } from '../lib/models/causal-vae.ts'
import { Lpips } from '../lib/models/lpips.ts'
import { framesDecode } from '../lib/ops/frames.ts'
import { mse } from '../lib/ops/mse.ts'
import { mean } from '../lib/ops/reduce.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { drain } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { Dataset } from '../lib/train/dataset.ts'
import { bestCheckpoint } from '../lib/train/run.ts'
import { reconstructionSteps } from '../lib/train/vae-samples.ts'
import { VaeTrainer, type VaeTrainerOptions } from '../lib/train/vae-trainer.ts'
import { fakeClips, tinyVae } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'vae-validation-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const options = { batchSize: 2, seed: 2, learningRate: 5e-3, warmupSteps: 0, klWeight: 1e-3 }
const DIGITS = 5

/** A VAE, clips that it is not trained on, and what makes a trainer that validates on them. */
function setUp(
  out: string,
  more: Partial<VaeTrainerOptions> = {},
): { model: ReturnType<typeof tinyVae>; validation: Dataset; make: () => VaeTrainer } {
  const { data } = fakeClips(['0.mp4', '1.mp4', '2.mp4', '3.mp4'])
  const { data: validation } = fakeClips(['8.mp4', '9.mp4', '7.mp4'])
  const model = tinyVae({ train: true })
  const make = (): VaeTrainer =>
    new VaeTrainer({ model, data, validation, out: join(folder, out), steps: 4, ...options, ...more })
  return { model, validation, make }
}

test('the validation of a VAE is the mean loss of whole clips, decoded from the mean of their posteriors', async () => {
  const { model, validation, make } = setUp('none')
  const trainer = make()
  const expected = { reconstruction: 0, kl: 0 }
  const { width, height, frames } = validation.options
  for (let i = 0; i < validation.length; i++) {
    const bytes = await validation.load(i)
    const terms = scope(() => {
      const target = framesDecode(Tensor.from(bytes, [1, frames, height, width, 3]))
      const posterior = model.encode(target)
      return [keep(mean(mse(model.decode(posterior.mean), target))), keep(klLoss(posterior))]
    })
    expected.reconstruction += (await terms[0].item()) / validation.length
    expected.kl += (await terms[1].item()) / validation.length
    for (const t of terms) t.dispose()
  }
  const found = await trainer.validate()
  expect(Object.keys(found)).toEqual(['loss', 'reconstruction', 'kl'])
  expect(found.reconstruction).toBeCloseTo(expected.reconstruction, DIGITS)
  expect(found.kl / expected.kl).toBeCloseTo(1, DIGITS)
  expect(found.loss).toBeCloseTo(found.reconstruction + 1e-3 * found.kl, DIGITS)
  expect(await trainer.validate()).toEqual(found)
  trainer.dispose()
  model.dispose()
})

test('a run validates, keeps the best checkpoint, and trains as it would without', async () => {
  const losses = async (out: string, validateEvery?: number) => {
    const more =
      validateEvery === undefined ? { validation: undefined } : { validateEvery, validationClips: 2 }
    const { model, make } = setUp(out, more as Partial<VaeTrainerOptions>)
    const trainer = make()
    const [steps, validations]: [number[], number[]] = [[], []]
    for await (const event of trainer.run()) {
      if (event.type === 'step') steps.push(event.loss)
      if (event.type === 'validation') validations.push(event.loss)
    }
    trainer.dispose()
    model.dispose()
    return { steps, validations }
  }
  const with2 = await losses('with', 2)
  expect(with2.validations).toHaveLength(2)
  // The moving average follows slowly, but it follows.
  expect(with2.validations[1]).toBeLessThan(with2.validations[0])
  expect((await bestCheckpoint(join(folder, 'with')))?.step).toBe(4)
  expect((await losses('without')).steps).toEqual(with2.steps)
})

test('a run shows clips beside their reconstructions, made with the moving average of the weights', async () => {
  const { model, validation, make } = setUp('shown', { samples: { every: 4, clips: 2, shownFrames: 3 } })
  const trainer = make()
  let files: readonly string[] = []
  for await (const event of trainer.run()) if (event.type === 'samples') files = event.files
  expect(files).toHaveLength(1)
  const { width, height } = await sharp(files[0]).metadata()
  // Two columns of three frames, two rows under labels.
  const frame = validation.options.width
  expect(width).toBeGreaterThanOrEqual(2 * 3 * frame)
  expect(height).toBeGreaterThanOrEqual(2 * frame)
  const bytes = await validation.load(0)
  const made = scope(() => keep(drain(reconstructionSteps(model, bytes, validation.options))))
  expect(made.shape).toEqual([1, 9, frame, frame, 3])
  made.dispose()
  await expect(
    setUp('none', { samples: { clips: 0 } })
      .make()
      .sample(1, folder),
  ).rejects.toMatchObject({
    code: 'ERR_OPTION',
  })
  trainer.dispose()
  model.dispose()
})

test('clips that cannot be used are refused, or left out where the data set may', async () => {
  expect(() => setUp('a', { validationClips: 0 }).make()).toThrow(/validationClips/)
  const { validation } = setUp('b')
  const bucket = { ...validation.options, width: 36 }
  const odd = new Dataset([validation.item(0)], { ...bucket, backend: validation.backend })
  expect(() => setUp('c', { validation: odd }).make()).toThrow(/validation: .*multiple of 8 pixels.*36×/)
  const narrow = new Dataset([validation.item(0)], {
    ...validation.options,
    width: 8,
    backend: validation.backend,
  })
  const perceptual = { model: Lpips.create(new Generator(1)) }
  expect(() =>
    setUp('d', { validation: narrow, perceptual, crops: [{ size: 32, frames: 1 }] }).make(),
  ).toThrow(/16×16/)
  perceptual.model.dispose()
  const { model, make } = setUp('e', { validation: undefined } as unknown as Partial<VaeTrainerOptions>)
  const trainer = make()
  await expect(trainer.validate()).rejects.toMatchObject({ code: 'ERR_OPTION' })
  trainer.dispose()
  model.dispose()

  const failing = {
    ...validation.backend,
    decode: async (path: string, how: never) => {
      if (path.startsWith('8')) throw new PyraflowError('ERR_IO', { what: path, received: 'half a file' })
      return await validation.backend.decode(path, how)
    },
  }
  const items = [0, 1].map((i) => validation.item(i))
  for (const [onBad, expected] of [
    ['fail', { code: 'ERR_IO', message: expect.stringContaining('8.mp4') }],
    ['skip', undefined],
  ] as const) {
    const some = new Dataset(items, {
      ...validation.options,
      ...{ backend: failing, onBad, onBadItem: () => undefined },
    } as ConstructorParameters<typeof Dataset>[1])
    const ours = setUp(`f-${onBad}`, { validation: some })
    const judge = ours.make()
    const found = judge.validate()
    if (expected) await expect(found).rejects.toMatchObject(expected)
    else expect((await found).loss).toBeGreaterThan(0)
    judge.dispose()
    ours.model.dispose()
  }
})
