import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import type { LatentDataset } from '../lib/train/latents.ts'
import { AdamW } from '../lib/train/optimizer.ts'
import type { TrainEvent } from '../lib/train/run.ts'
import { learningRates } from '../lib/train/schedule.ts'
import { VaeTrainer } from '../lib/train/vae-trainer.ts'
import { average, collect, losses } from './fixtures/events.ts'
import { fakeClips, numbers, tinyDit, tinyLatents, tinyText, tinyTrainer, tinyVae } from './fixtures/tiny.ts'
import { golden, maxAbsolute, relativeL2 } from './golden.ts'
import { live } from './gradcheck.ts'

const folder = mkdtempSync(join(tmpdir(), 'train-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

function nearestBf16(x: number): number {
  const word = new Uint32Array(Float32Array.of(x).buffer)
  const bits = word[0] as number
  word[0] = (bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000
  return new Float32Array(word.buffer)[0] as number
}

describe('AdamW', () => {
  const SHAPES: Record<string, number[]> = {
    'a.weight': [5, 7],
    'a.bias': [7],
    'norm.weight': [3],
    'b.weight': [2, 3, 2],
  }
  const options = { betas: [0.9, 0.95] as const, eps: 1e-8, weightDecay: 0.1, maxGradNorm: 1, emaDecay: 0.5 }

  // The textbook update, parameter by parameter, in doubles.
  class Plain {
    readonly p = new Map<string, Float64Array>()
    readonly m = new Map<string, Float64Array>()
    readonly v = new Map<string, Float64Array>()
    readonly ema = new Map<string, Float64Array>()
    n = 0

    constructor(initial: Map<string, ArrayLike<number>>) {
      for (const [name, values] of initial) {
        this.p.set(name, Float64Array.from(values))
        this.ema.set(name, Float64Array.from(values))
        this.m.set(name, new Float64Array(values.length))
        this.v.set(name, new Float64Array(values.length))
      }
    }

    step(lr: number, grads: Map<string, Float32Array>): number {
      this.n++
      const norm = Math.sqrt([...grads.values()].flatMap((g) => [...g]).reduce((n, g) => n + g * g, 0))
      const clip = Math.min(1, options.maxGradNorm / (norm + 1e-6))
      const ema = Math.min(options.emaDecay, (1 + this.n) / (10 + this.n))
      for (const [name, p] of this.p) {
        const [m, v, e, g] = [this.m, this.v, this.ema, grads].map((x) => x.get(name)) as Float64Array[]
        const decay = SHAPES[name]!.length > 1 ? options.weightDecay : 0
        p.forEach((_, i) => {
          const gi = g![i]! * clip
          m![i] = 0.9 * m![i]! + 0.1 * gi
          v![i] = 0.95 * v![i]! + 0.05 * gi * gi
          p[i] = p[i]! * (1 - lr * decay)
          p[i]! -=
            (lr * (m![i]! / (1 - 0.9 ** this.n))) / (Math.sqrt(v![i]! / (1 - 0.95 ** this.n)) + options.eps)
          e![i] = ema * e![i]! + (1 - ema) * p[i]!
        })
      }
      return norm
    }
  }

  for (const dtype of ['f32', 'bf16'] as const) {
    test(`over one flat buffer equals the plain update in ${dtype}: decay groups, clipping, average`, async () => {
      const initial = new Map(
        Object.entries(SHAPES).map(([name, shape], i) => {
          const values = numbers(
            shape.reduce((a, b) => a * b),
            i + 1,
          )
          return [name, dtype === 'bf16' ? values.map(nearestBf16) : values]
        }),
      )
      const parameters = new Map(
        [...initial].map(([name, values]) => [name, Tensor.from(values, SHAPES[name], dtype)]),
      )
      for (const p of parameters.values()) p.requiresGrad = true
      const optimizer = new AdamW(parameters, options)
      const plain = new Plain(initial)
      for (let step = 0; step < 5; step++) {
        // The first gradients are long enough to be clipped, the later ones are not.
        const size = step < 2 ? 5 : 0.05
        const grads = new Map(
          [...initial].map(([name, v], i) => [name, numbers(v.length, 50 * step + i, size)]),
        )
        for (const [name, g] of grads) parameters.get(name)!.grad!.write(g)
        const clip = optimizer.step(0.01 * (step + 1))
        const [norm, coefficient] = await clip.floats()
        const expected = plain.step(0.01 * (step + 1), grads)
        expect(norm! / expected).toBeCloseTo(1, 5)
        expect(coefficient! < 1).toBe(step < 2)
        clip.dispose()
      }
      const master = optimizer.masterTensors()
      const ema = optimizer.emaTensors()
      for (const [name, values] of plain.p) {
        const held = await master.get(name)!.floats()
        expect(relativeL2(held, values), name).toBeLessThan(2e-6)
        expect(relativeL2(await ema.get(name)!.floats(), plain.ema.get(name)!), name).toBeLessThan(2e-6)
        const own = await parameters.get(name)!.floats()
        expect(own, name).toEqual(dtype === 'bf16' ? held.map(nearestBf16) : held)
        expect(await parameters.get(name)!.grad!.floats()).toEqual(new Float32Array(values.length))
      }
      for (const t of [...master.values(), ...ema.values(), ...parameters.values()]) t.dispose()
      optimizer.dispose()
      expect(await live()).toBe(0)
    })
  }

  test('leaves everything as it was when a gradient is not finite', async () => {
    const parameters = new Map([['w', Tensor.from(numbers(6, 1), [2, 3])]])
    const optimizer = new AdamW(parameters, { emaDecay: 0 })
    const before = await parameters.get('w')!.floats()
    parameters.get('w')!.grad!.write(Float32Array.of(1, 2, Number.NaN, 1, 1, 1))
    const clip = optimizer.step(0.1)
    expect(Number.isNaN((await clip.floats())[1])).toBe(true)
    expect(await parameters.get('w')!.floats()).toEqual(before)
    parameters.get('w')!.grad!.write(numbers(6, 2))
    optimizer.step(0.1).dispose()
    expect((await parameters.get('w')!.floats()).every(Number.isFinite)).toBe(true)
    clip.dispose()
    parameters.get('w')!.dispose()
    optimizer.dispose()
  })

  test('lends the model its moving average and gives its own weights back', async () => {
    for (const dtype of ['f32', 'bf16'] as const) {
      const w = Tensor.from(numbers(6, 1), [2, 3], dtype)
      const optimizer = new AdamW(new Map([['w', w]]), { emaDecay: 0.5 })
      w.grad!.write(numbers(6, 2))
      optimizer.step(0.5).dispose()
      const own = await w.floats()
      const ema = optimizer.emaTensors().get('w')!
      const average = await ema.floats()
      const seen = await optimizer.withEma(() => w.floats())
      expect(seen).toEqual(dtype === 'bf16' ? average.map(nearestBf16) : average)
      expect(await w.floats()).toEqual(own)
      ema.dispose()
      w.dispose()
      optimizer.dispose()
    }
  })
})

describe('learning rates', () => {
  const { tensors } = golden('train_lr_schedule')
  const cases = {
    constant_no_warmup: { learningRate: 3e-4, warmupSteps: 0, kind: 'constant', totalSteps: 10 },
    constant_with_warmup: { learningRate: 5e-5, warmupSteps: 7, kind: 'constant', totalSteps: 40 },
    cosine: { learningRate: 5e-5, warmupSteps: 7, kind: 'cosine', totalSteps: 40, minLearningRate: 1e-5 },
  } as const
  for (const [name, options] of Object.entries(cases)) {
    test(`follow the recorded table ${name}`, () => {
      const { file, begin, end } = tensors.entries.get(name)!
      const bytes = readFileSync(file).subarray(begin, end)
      const expected = Float64Array.from({ length: bytes.length / 8 }, (_, i) => bytes.readDoubleLE(8 * i))
      expect(maxAbsolute(learningRates(options), expected)).toBeLessThan(1e-12)
    })
  }

  test('refuse a warm-up longer than the run', () => {
    const call = () => learningRates({ learningRate: 1, warmupSteps: 11, totalSteps: 10 })
    expect(call).toThrow(
      expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringContaining('warmupSteps') }),
    )
  })
})

describe('training the transformer', () => {
  test('learns four clips by heart', async () => {
    const data = await tinyLatents(join(folder, 'fit-data'))
    const { trainer, model } = tinyTrainer({
      data,
      out: join(folder, 'fit'),
      steps: 80,
      optimizer: { emaDecay: 0.9 },
    })
    const found = losses(await collect(trainer.run()))
    expect(found).toHaveLength(80)
    const [first, last] = [average(found.slice(0, 8)), average(found.slice(-8))]
    expect(last, `${first} → ${last}`).toBeLessThan(0.7 * first)
    trainer.dispose()
    model.dispose()
    data.dispose()
  })

  test('trains first frames alone as often as asked', async () => {
    const data = await tinyLatents(join(folder, 'still-data'), { frames: 3 })
    for (const imageRatio of [0, 1]) {
      const out = join(folder, `still-${imageRatio}`)
      const { trainer, model } = tinyTrainer({ data, out, steps: 6, imageRatio })
      const clips: number[] = []
      const forwardSteps = model.forwardSteps.bind(model)
      model.forwardSteps = (inputs) => {
        clips.push(...inputs.columns.map((column) => column.length))
        return forwardSteps(inputs)
      }
      await collect(trainer.run())
      if (imageRatio === 1) expect(new Set(clips)).toEqual(new Set([1]))
      else expect(Math.max(...clips)).toBeGreaterThan(1)
      trainer.dispose()
      model.dispose()
    }
    expect(() => tinyTrainer({ data, out: folder, steps: 1, imageRatio: 2 })).toThrow(
      expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringContaining('imageRatio') }),
    )
    data.dispose()
  })

  test('draws from the posterior or takes its means', async () => {
    // logvar −12 and 0: only samples can tell.
    const [narrow, wide] = await Promise.all(
      [-12, 0].map((logvar) => tinyLatents(join(folder, `posterior${logvar}`), { logvar })),
    )
    const lossOf = async (data: LatentDataset, posterior: 'sample' | 'mean'): Promise<number> => {
      const out = join(folder, 'posterior')
      const { trainer, model } = tinyTrainer({ data, out, steps: 1, posterior })
      const kept = scope(() => keep(trainer.forward(0, trainer.batch(0)).loss))
      const loss = await kept.item()
      kept.dispose()
      trainer.dispose()
      model.dispose()
      return loss
    }
    expect(await lossOf(wide, 'mean')).toBe(await lossOf(narrow, 'mean'))
    expect(await lossOf(wide, 'sample')).not.toBe(await lossOf(narrow, 'sample'))
    for (const data of [narrow, wide]) data.dispose()
  })

  for (const dtype of ['f32', 'bf16'] as const) {
    test(`continues with the same losses after an abort and a resume in ${dtype}`, async () => {
      const data = await tinyLatents(join(folder, `resume-data-${dtype}`), { count: 9 })
      const out = join(folder, `resume-${dtype}`)
      const whole = tinyTrainer({ data, out: `${out}-whole`, steps: 8, dtype })
      const straight = await collect(whole.trainer.run())
      const weights = new Map<string, Float32Array>()
      for (const [name, p] of whole.model.parameters) weights.set(name, await p.floats())

      const stop = new AbortController()
      const first = tinyTrainer({ data, out, steps: 8, dtype })
      const begun: TrainEvent[] = []
      const run = async (): Promise<void> => {
        for await (const event of first.trainer.run({ signal: stop.signal })) {
          begun.push(event)
          if (event.type === 'step' && event.step === 4) stop.abort()
        }
      }
      await expect(run()).rejects.toMatchObject({ name: 'PyraflowError', code: 'ERR_ABORTED' })
      expect(begun.at(-1)).toMatchObject({ type: 'checkpoint', step: 4 })

      const second = tinyTrainer({ data, out, steps: 8, dtype })
      const continued = await collect(second.trainer.run({ resume: true }))
      expect(continued[0]).toEqual({ type: 'resume', step: 4 })
      expect([...losses(begun), ...losses(continued)]).toEqual(losses(straight))
      for (const [name, p] of second.model.parameters)
        expect(await p.floats(), name).toEqual(weights.get(name))
      for (const { trainer, model } of [whole, first, second]) {
        trainer.dispose()
        model.dispose()
      }
      data.dispose()
      expect(await live()).toBe(0)
    })
  }

  test('keeps the two newest checkpoints, whose model folder loads, and a line a step', async () => {
    const data = await tinyLatents(join(folder, 'keep-data'))
    const out = join(folder, 'keep')
    const { trainer, model } = tinyTrainer({ data, out, steps: 5, checkpointEvery: 1 })
    const events = await collect(trainer.run())
    expect(events.filter((e) => e.type === 'checkpoint').map((e) => e.step)).toEqual([1, 2, 3, 4, 5])
    expect(readdirSync(out).sort()).toEqual(['checkpoint-4', 'checkpoint-5', 'loss.svg', 'metrics.jsonl'])
    const lines = readFileSync(join(out, 'metrics.jsonl'), 'utf8').trim().split('\n')
    expect(lines.map((line) => JSON.parse(line))).toEqual(events.filter((e) => e.type === 'step'))
    const ema = trainer.optimizer.emaTensors()
    const loaded = await PyramidFluxTransformer.fromPretrained(
      join(out, 'checkpoint-5', 'diffusion_transformer'),
    )
    for (const [name, p] of loaded.parameters)
      expect(await p.floats(), name).toEqual(await ema.get(name)!.floats())
    for (const t of ema.values()) t.dispose()
    loaded.dispose()
    trainer.dispose()
    model.dispose()
    data.dispose()
  })

  test('refuses to resume from the state of another network, naming the file', async () => {
    const data = await tinyLatents(join(folder, 'other-data'))
    const out = join(folder, 'other')
    const first = tinyTrainer({ data, out, steps: 1 })
    await collect(first.trainer.run())
    const model = PyramidFluxTransformer.create(
      { ...first.model.config, num_single_layers: 2 },
      { seed: 1, train: true },
    )
    const second = tinyTrainer({ data, out, steps: 2, model })
    await expect(collect(second.trainer.run({ resume: true }))).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining('optimizer.safetensors'),
    })
    for (const { trainer, model: m } of [first, second]) {
      trainer.dispose()
      m.dispose()
    }
    model.dispose()
    data.dispose()
  })

  test('refuses batch sizes and columns that do not fit', async () => {
    const data = await tinyLatents(join(folder, 'option-data'))
    const out = join(folder, 'option')
    const model = tinyDit({ train: true })
    const wrong: [object, string][] = [
      [{ batchSize: 3 }, 'a multiple of 4 columns'],
      [{ sampleRatios: [1, 1] }, '3 integers from 1'],
      [{ steps: 10, warmupSteps: 20 }, 'warmupSteps'],
    ]
    for (const [options, text] of wrong) {
      const call = async (): Promise<unknown> => {
        const { trainer, model: own } = tinyTrainer({ data, out, steps: 1, model, ...options })
        own.dispose()
        return collect(trainer.run())
      }
      await expect(call(), text).rejects.toMatchObject({
        code: 'ERR_OPTION',
        message: expect.stringContaining(text),
      })
    }
    model.dispose()
    data.dispose()
  })
})

describe('training the VAE', () => {
  const names = ['0.mp4', '1.mp4', '2.mp4', '3.mp4']

  test('learns four clips, and continues with the same losses after a resume', async () => {
    const run = async (out: string, steps: number, stopAt?: number, resume = false): Promise<number[]> => {
      const { data } = fakeClips(names)
      const model = tinyVae({ train: true })
      const trainer = new VaeTrainer({
        model,
        data,
        out: join(folder, out),
        steps,
        batchSize: 2,
        seed: 2,
        learningRate: 5e-3,
        warmupSteps: 2,
        crops: [
          { size: 24, frames: 9 },
          { size: 24, frames: 1, perClip: 2, until: 2 },
        ],
      })
      const stop = new AbortController()
      const found: number[] = []
      try {
        for await (const event of trainer.run({ signal: stop.signal, resume })) {
          if (event.type === 'step') found.push(event.loss)
          if (event.type === 'step' && event.step === stopAt) stop.abort()
        }
      } catch (error) {
        expect(error).toMatchObject({ code: 'ERR_ABORTED' })
      }
      trainer.dispose()
      model.dispose()
      return found
    }
    const straight = await run('vae-whole', 14)
    expect(straight).toHaveLength(14)
    const [first, last] = [average(straight.slice(0, 3)), average(straight.slice(-3))]
    expect(last, `${first} → ${last}`).toBeLessThan(0.7 * first)
    const begun = await run('vae', 14, 3)
    expect([...begun, ...(await run('vae', 14, undefined, true))]).toEqual(straight)
    expect(existsSync(join(folder, 'vae', 'checkpoint-14', 'causal_video_vae', 'config.json'))).toBe(true)
  })

  test('refuses crops that do not fit clip or network', () => {
    const { data } = fakeClips(names)
    const model = tinyVae({ train: true })
    for (const crop of [
      { size: 20, frames: 9 },
      { size: 40, frames: 9 },
      { size: 16, frames: 8 },
      { size: 16, frames: 17 },
      { size: 16, frames: 9, from: 1 },
      { size: 16, frames: 9, until: 1 },
    ]) {
      expect(
        () => new VaeTrainer({ model, data, out: folder, steps: 2, batchSize: 1, crops: [crop] }),
      ).toThrow(expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringContaining('crop') }))
    }
    model.dispose()
  })
})

test('captions with unknown words are refused with the vocabulary', () => {
  expect(() => tinyText().encode(['a green circle'])).toThrow(
    expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringMatching(/green.*red blue circle/) }),
  )
})
