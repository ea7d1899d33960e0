import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, it } from 'vitest'
import { writeSafetensors } from '../lib/io/write-safetensors.ts'
import { samplePosterior } from '../lib/models/causal-vae.ts'
import { type DiscriminatorConfig, PatchDiscriminator } from '../lib/models/discriminator.ts'
import { Lpips } from '../lib/models/lpips.ts'
import { tensorsToWrite } from '../lib/nn/export.ts'
import { mul, scale, square } from '../lib/ops/pointwise.ts'
import { mean, sum } from '../lib/ops/reduce.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { scope } from '../lib/tensor/scope.ts'
import { sliced } from '../lib/tensor/sliced.ts'
import { backward, backwardSteps, differentiate, drain, noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import type { TrainEvent } from '../lib/train/run.ts'
import { softplus, VaeLoss } from '../lib/train/vae-loss.ts'
import { VaeTrainer, type VaeTrainerOptions } from '../lib/train/vae-trainer.ts'
import { fakeClips, numbers, tinyVae } from './fixtures/tiny.ts'
import { relativeL2 } from './golden.ts'
import { gradcheck, live, random } from './gradcheck.ts'

const folder = mkdtempSync(join(tmpdir(), 'vae-losses-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const NARROW: Partial<DiscriminatorConfig> = { ndf: 4, n_layers: 2 }

function critic(config: Partial<DiscriminatorConfig> = NARROW, dtype: 'f32' | 'bf16' = 'f32') {
  const made = PatchDiscriminator.create(config, { generator: new Generator(4), train: true, dtype })
  // Of the published size weights are N(0, 0.02); so few channels would say next to nothing with that.
  let seed = 1
  if (dtype === 'f32') for (const p of made.parameters.values()) p.write(numbers(p.size, seed++, 0.4))
  return made
}

// Fourth order: instance norm over few pixels bends a lot.
const STENCIL: readonly (readonly [number, number])[] = [
  [1, 8 / 12],
  [-1, -8 / 12],
  [2, -1 / 12],
  [-2, 1 / 12],
]

/**
 * How far the slope of f in x along a direction, as the tape has it, is from central differences, relative to it.
 * Networks with kinks have no smooth neighbourhood, so the two agree only as far as the step stays between them.
 */
async function slopeError(f: () => Tensor, x: Tensor, seed: number): Promise<number> {
  x.requiresGrad = true
  x.grad?.dispose()
  x.grad = null
  scope(() => backward(f()))
  const gradient = await x.grad!.floats()
  x.grad!.dispose()
  x.grad = null
  const own = await x.floats()
  // Half along the gradient: along random directions alone large parts cancel to a slope that is all rounding.
  const rms = Math.sqrt(gradient.reduce((n, g) => n + g * g, 0) / gradient.length)
  const direction = numbers(own.length, seed).map((v, i) => v + gradient[i]! / rms)
  const tape = gradient.reduce((total, g, i) => total + g * direction[i]!, 0)
  const eps = 2e-4
  let difference = 0
  for (const [step, factor] of STENCIL) {
    x.write(own.map((v, i) => v + step * eps * direction[i]!))
    const value = noGrad(() => scope(f))
    difference += ((await value.item()) * factor) / eps
    value.dispose()
  }
  x.write(own)
  return Math.abs(tape - difference) / Math.abs(difference)
}

describe('differentiate', () => {
  it('gives what backward gives, leaves collect as ever, and nothing else is left', async () => {
    const before = await live()
    const [x, w] = [random([3, 4]), random([4])]
    w.requiresGrad = true
    const half = random([1])
    const run = function* (a: Tensor) {
      const products = mul(square(a), w)
      yield
      return { loss: scale(sum(products), 2), half: scale(half, 0.5) }
    }
    const { outputs, gradients } = scope(() => drain(differentiate(run, [x])))
    const [xs, ws] = [await x.floats(), await w.floats()]
    expect(
      relativeL2(
        await gradients[0]!.floats(),
        xs.map((v, i) => 4 * v * ws[i % 4]!),
      ),
    ).toBeLessThan(1e-6)
    const ofW = Float32Array.from({ length: 4 }, (_, j) =>
      [0, 1, 2].reduce((n, i) => n + 2 * xs[4 * i + j]! ** 2, 0),
    )
    expect(relativeL2(await w.grad!.floats(), ofW)).toBeLessThan(1e-6)
    expect(await outputs.half.item()).toBeCloseTo((await half.item()) / 2, 6)
    for (const t of [x, w, w.grad!, half, outputs.loss, outputs.half, gradients[0]!]) t.dispose()
    expect(await live()).toBe(before)
  })

  it('leaves the tape around it alone, also when it pauses', async () => {
    const x = random([5])
    x.requiresGrad = true
    const loss = await sliced(function* () {
      const y = scale(x, 3)
      const inner = yield* differentiate(
        function* (z) {
          yield
          return { loss: sum(square(z)) }
        },
        [y],
      )
      expect(inner.gradients[0]!.shape).toEqual([5])
      const total = sum(mul(y, inner.gradients[0]!))
      yield* backwardSteps(total)
      return total
    })
    // The inner gradient, 2y, is a constant of the outer tape: d/dx Σ 3x·6x₀ = 18x₀.
    expect(
      relativeL2(
        await x.grad!.floats(),
        (await x.floats()).map((v) => 18 * v),
      ),
    ).toBeLessThan(1e-6)
    for (const t of [loss, x.grad!, x]) t.dispose()
  })
})

it('softplus is log(1 + exp x), and differentiates', async () => {
  const xs = Float32Array.of(-90, -20, -3, -0.7, -1e-3, 0, 1e-3, 0.4, 2, 15, 90)
  const y = scope(() => softplus(Tensor.from(xs)))
  const expected = xs.map((x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))))
  for (const [i, v] of (await y.floats()).entries()) {
    expect(Math.abs(v - expected[i]!), String(xs[i])).toBeLessThan(2e-6)
  }
  y.dispose()
  await gradcheck(softplus, [random([13], { scale: 2, offset: 0.5 })])
})

describe('LPIPS', () => {
  it('is zero for equal frames, differentiates, and gives no gradient to the target', async () => {
    const lpips = Lpips.create(new Generator(1))
    const shape = [1, 1, 18, 17, 3]
    const x = Tensor.from(numbers(918, 1), shape)
    x.requiresGrad = true
    const y = Tensor.from(numbers(918, 2), shape)
    const distance = (): Tensor => mean(drain(lpips.distanceSteps(x, y)))
    for (const seed of [5, 6]) expect(await slopeError(distance, y, seed)).toBeLessThan(2e-2)
    y.write(await x.floats())
    const same = noGrad(() => scope(distance))
    expect(await same.item()).toBe(0)
    expect(x.grad).toBeNull()
    for (const t of [same, x, y, lpips]) t.dispose()
  })

  it('stays finite where a frame has no features at all', async () => {
    const lpips = Lpips.create(new Generator(1))
    for (const [name, p] of lpips.parameters)
      if (name.endsWith('bias')) p.write(new Float32Array(p.size).fill(-9))
    const y = Tensor.from(numbers(768, 2, 0.01), [1, 1, 16, 16, 3])
    y.requiresGrad = true
    const x = Tensor.from(numbers(768, 1, 0.01), [1, 1, 16, 16, 3])
    const value = scope(() => {
      const total = sum(drain(lpips.distanceSteps(x, y)))
      backward(total)
      return total
    })
    expect(await value.item()).toBe(0)
    expect((await y.grad!.floats()).every((g) => g === 0)).toBe(true)
    for (const t of [value, x, y, y.grad!, lpips]) t.dispose()
  })

  it('loads the published names from a file, in bf16 too, and names what is missing', async () => {
    const made = Lpips.create(new Generator(2))
    const path = join(folder, 'lpips.safetensors')
    const tensors = [...made.parameters]
    const twice: [string, Tensor][] = [['lins.0.model.1.weight', made.parameters.get('lin0.model.1.weight')!]]
    await writeSafetensors(path, tensorsToWrite([...tensors, ...twice]))
    const [x, y] = [1, 2].map((seed) => Tensor.from(numbers(1536, seed), [2, 1, 16, 16, 3])) as [
      Tensor,
      Tensor,
    ]
    const distance = async (network: Lpips): Promise<Float32Array> => {
      const t = noGrad(() => scope(() => drain(network.distanceSteps(x, y))))
      const values = await t.floats()
      t.dispose()
      network.dispose()
      return values
    }
    const own = await distance(made)
    expect(own).toHaveLength(2)
    expect(await distance(await Lpips.fromPretrained(path))).toEqual(own)
    expect(relativeL2(await distance(await Lpips.fromPretrained(path, { dtype: 'bf16' })), own)).toBeLessThan(
      2e-2,
    )
    await writeSafetensors(join(folder, 'half.safetensors'), [
      { name: 'net.slice1.0.weight', dtype: 'F32', shape: [64, 3, 3, 3], data: new Float32Array(1728) },
    ])
    await expect(Lpips.fromPretrained(join(folder, 'half.safetensors'))).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining("missing 'net.slice1.0.bias'"),
    })
    for (const t of [x, y]) t.dispose()
  })

  it('refuses frames that are too small', () => {
    const lpips = Lpips.create(new Generator(1))
    const x = Tensor.zeros([1, 1, 15, 64, 3])
    expect(() => drain(lpips.featureSteps(x))).toThrow(/at least 16×16/)
    for (const t of [x, lpips]) t.dispose()
  })
})

describe('a patch discriminator', () => {
  for (const [dims, sizes] of [
    [2, [2, 20, 24]],
    [3, [13, 32, 32]],
  ] as const) {
    it(`in ${dims} dimensions differentiates by its input and every parameter`, async () => {
      const net = critic({ ...NARROW, dims })
      const x = random([1, 3, ...sizes])
      const value = (): Tensor => mean(square(drain(net.forwardSteps(x))))
      for (const [name, t] of [['x', x] as const, ...net.parameters]) {
        // Biases in front of a norm have no effect.
        if (/main\.[25]\.bias/.test(name)) continue
        // A bias moves every pixel towards a kink.
        expect(await slopeError(value, t, 3), name).toBeLessThan(5e-2)
      }
      for (const t of [x, ...net.parameters.values()]) t.grad?.dispose()
      x.dispose()
      net.dispose()
    })
  }

  it('keeps gradients from frozen parameters but passes them to the video', async () => {
    const net = critic()
    const x = random([1, 3, 1, 16, 16])
    x.requiresGrad = true
    scope(() => backward(mean(drain(net.forwardSteps(x, { frozen: true })))))
    expect((await x.grad!.floats()).some((g) => g !== 0)).toBe(true)
    expect([...net.parameters.values()].every((p) => p.grad === null)).toBe(true)
    for (const t of [x.grad!, x, net]) t.dispose()
  })

  it('has one logit a patch, the published names and sizes, and refuses what has no room', async () => {
    const net = PatchDiscriminator.create({}, { generator: new Generator(0) })
    expect(
      [...net.parameters]
        .map(([name, p]) => [name, ...p.shape])
        .filter(([name]) => /weight/.test(String(name))),
    ).toEqual([
      ['main.0.weight', 64, 3, 4, 4],
      ['main.2.weight', 128, 64, 4, 4],
      ['main.5.weight', 256, 128, 4, 4],
      ['main.8.weight', 512, 256, 4, 4],
      ['main.11.weight', 512, 512, 4, 4],
      ['main.14.weight', 1, 512, 4, 4],
    ])
    const x = Tensor.zeros([1, 3, 2, 64, 80])
    const y = noGrad(() => scope(() => drain(net.forwardSteps(x))))
    expect(y.shape).toEqual([2, 1, 2, 3])
    expect(() => net.checkShape([1, 3, 1, 40, 64])).toThrow(/room for a patch/)
    expect(() => net.checkShape([1, 4, 1, 64, 64])).toThrow(/room for a patch/)
    expect(() => PatchDiscriminator.create({ ndf: 0 }, { generator: new Generator(0) })).toThrow(/ndf/)
    for (const t of [x, y, net]) t.dispose()
  })
})

describe('the loss of the VAE', () => {
  it('takes the last layer of the decoder from a capture', async () => {
    const vae = tinyVae({ train: true })
    const z = random([1, 16, 2, 2, 2])
    let input: Tensor | undefined
    const { decoded, again } = scope(() => {
      const made = vae.decode(z, {
        capture: (name, x) => {
          if (name === 'decoder.conv_out.input') input = x
        },
      })
      return { decoded: made, again: vae.lastLayer.run(input!, vae.lastLayer.weight) }
    })
    // The bias of a new network is zero.
    expect(relativeL2(await again.floats(), await decoded.floats())).toBeLessThan(1e-6)
    for (const t of [decoded, again, z, vae]) t.dispose()
  })

  // Finite differences cannot see the adaptive weight, a constant of the gradient; so the gradient is put together from
  // the parts that backward gives without it.
  for (const kind of ['hinge', 'vanilla'] as const) {
    it(`weighs the ${kind} adversarial term by the gradients at the last layer, and starts it when asked to`, async () => {
      const vae = tinyVae({ train: true })
      const discriminator = critic()
      const loss = new VaeLoss({
        pixelWeight: 10,
        adversarial: { discriminator, weight: 0.7, start: 3, kind },
      })
      const target = random([1, 3, 1, 16, 16])
      const weight = vae.lastLayer.weight
      const run = async (step: number, only?: (decoded: Tensor) => Tensor) => {
        const made = scope(() => {
          const posterior = vae.encode(target)
          let input: Tensor | undefined
          const decoded = vae.decode(samplePosterior(posterior, Tensor.zeros(posterior.mean.shape)), {
            capture: (name, x) => {
              if (name === 'decoder.conv_out.input') input = x
            },
          })
          const { run: last } = vae.lastLayer
          const lastLayer = { weight, run: (w: Tensor) => last(input!, w) }
          const result = only
            ? { loss: only(decoded) }
            : drain(loss.vaeSteps(step, { target, decoded, posterior, lastLayer }))
          backward(result.loss)
          return result
        })
        const gradient = await weight.grad!.floats()
        for (const p of vae.parameters.values()) {
          p.grad?.dispose()
          p.grad = null
        }
        const values: Record<string, number> = { loss: await made.loss.item() }
        for (const [name, t] of Object.entries('metrics' in made ? (made.metrics ?? {}) : {})) {
          values[name] = await t.item()
          t.dispose()
        }
        made.loss.dispose()
        return { gradient, values }
      }
      const before = await run(2)
      expect(Object.keys(before.values)).toEqual(['loss', 'reconstruction', 'kl'])
      const { gradient, values } = await run(3)
      const judged = await run(3, (decoded) =>
        scale(mean(drain(discriminator.forwardSteps(decoded, { frozen: true }))), -1),
      )
      expect(values.generator).toBeCloseTo(judged.values.loss!, 5)
      const norm = (v: Float32Array): number => Math.sqrt(v.reduce((n, x) => n + x * x, 0))
      // At the last layer the KL term has no gradient.
      const adaptive = (0.7 * norm(before.gradient)) / (norm(judged.gradient) + 1e-4)
      expect(values.adaptiveWeight! / adaptive).toBeCloseTo(1, 4)
      expect(
        relativeL2(
          gradient,
          before.gradient.map((g, i) => g + adaptive * judged.gradient[i]!),
        ),
      ).toBeLessThan(1e-4)
      expect(values.loss).toBeCloseTo(before.values.loss! + adaptive * judged.values.loss!, 4)

      const real = random([1, 3, 2, 16, 16])
      const fake = random([1, 3, 2, 16, 16])
      const posterior = { mean: real, logvar: real }
      const critics = scope(() => drain(loss.discriminatorSteps({ target: real, decoded: fake, posterior })))
      const logits = async (x: Tensor): Promise<Float32Array> => {
        const t = noGrad(() => scope(() => drain(discriminator.forwardSteps(x))))
        const v = await t.floats()
        t.dispose()
        return v
      }
      const bad =
        kind === 'hinge' ? (v: number) => Math.max(0, 1 + v) : (v: number) => Math.log1p(Math.exp(v))
      const average = (v: Float32Array, f: (x: number) => number): number =>
        v.reduce((n, x) => n + f(x), 0) / v.length
      const [a, b] = [await logits(real), await logits(fake)]
      const expected = 0.5 * (average(a, (v) => bad(-v)) + average(b, bad))
      expect(await critics.loss.item()).toBeCloseTo(expected, 5)
      expect(discriminator.parameters.get('main.0.weight')!.grad).not.toBeNull()
      for (const p of discriminator.parameters.values()) p.grad?.dispose()
      for (const t of [
        real,
        fake,
        target,
        critics.loss,
        ...Object.values(critics.metrics!),
        discriminator,
        vae,
      ])
        t.dispose()
    })
  }

  it('refuses negative weights', () => {
    expect(() => new VaeLoss({ klWeight: -1 })).toThrow(/klWeight/)
    expect(() => new VaeLoss({ pixelWeight: Number.NaN })).toThrow(/pixelWeight/)
  })
})

describe('training with all terms', () => {
  const clips = () => fakeClips(['0.mp4', '1.mp4', '2.mp4', '3.mp4']).data

  async function run(
    out: string,
    options: {
      steps: number
      stopAt?: number
      resume?: boolean
      dtype?: 'f32' | 'bf16'
      start?: number
      accumulate?: number
    },
  ) {
    const { steps, stopAt, resume = false, dtype = 'f32', start = 2, accumulate } = options
    const model = tinyVae({ train: true, dtype })
    const discriminator = critic(NARROW, dtype)
    const lpips = Lpips.create(new Generator(6), { dtype })
    const trainer = new VaeTrainer({
      model,
      data: clips(),
      out: join(folder, out),
      steps,
      batchSize: 1,
      accumulate,
      seed: 2,
      learningRate: 2e-3,
      warmupSteps: 1,
      crops: [{ size: 16, frames: 9 }],
      pixelWeight: 10,
      perceptual: { model: lpips },
      adversarial: { discriminator, start, learningRate: 1e-3 },
    })
    const stop = new AbortController()
    const events: TrainEvent[] = []
    try {
      for await (const event of trainer.run({ signal: stop.signal, resume })) {
        events.push(event)
        if (event.type === 'step' && event.step === stopAt) stop.abort()
      }
    } catch (error) {
      expect(error).toMatchObject({ code: 'ERR_ABORTED' })
    }
    const weights = new Map<string, Float32Array>()
    for (const [name, p] of [...model.parameters, ...discriminator.parameters])
      weights.set(name, await p.floats())
    const critics = trainer.discriminatorOptimizer!.stepCount
    for (const t of [trainer, model, discriminator, lpips]) t.dispose()
    const numbersOf = (event: TrainEvent): Record<string, unknown>[] =>
      event.type === 'step' ? [{ ...event, seconds: 0 }] : []
    return { steps: events.flatMap(numbersOf), weights, critics }
  }

  for (const [dtype, accumulate] of [
    ['f32', 1],
    ['bf16', 1],
    ['f32', 2],
  ] as const) {
    const named = `${dtype}-${accumulate}`
    it(`continues bit for bit after a resume, discriminator and its optimizer included, in ${dtype} with ${accumulate} micro-steps`, async () => {
      const whole = await run(`whole-${named}`, { steps: 6, dtype, accumulate })
      const begun = await run(`cut-${named}`, { steps: 6, dtype, accumulate, stopAt: 4 })
      const rest = await run(`cut-${named}`, { steps: 6, dtype, accumulate, resume: true })
      expect([...begun.steps, ...rest.steps]).toEqual(whole.steps)
      expect(whole.steps).toHaveLength(6)
      for (const [name, values] of whole.weights) expect(rest.weights.get(name), name).toEqual(values)
      expect([begun.critics, rest.critics, whole.critics]).toEqual([2, 4, 4])
      const names = whole.steps.map((step) => Object.keys(step).includes('discriminator'))
      expect(names).toEqual([false, false, true, true, true, true])
      for (const name of [
        'perception',
        'generator',
        'adaptiveWeight',
        'discriminatorReal',
        'discriminatorFake',
      ]) {
        expect(Number.isFinite(whole.steps[5]![name]), name).toBe(true)
      }
      const checkpoint = join(folder, `whole-${named}`, 'checkpoint-6')
      expect(JSON.parse(readFileSync(join(checkpoint, 'state.json'), 'utf8'))).toEqual({
        step: 6,
        updates: 6,
        companions: { discriminator: 4 },
      })
      const loaded = await PatchDiscriminator.fromPretrained(
        join(checkpoint, 'discriminator.safetensors'),
        NARROW,
        { dtype },
      )
      for (const [name, p] of loaded.parameters)
        expect(await p.floats(), name).toEqual(whole.weights.get(name))
      loaded.dispose()
      expect(await live()).toBe(0)
    })
  }

  it('lets a run that had no discriminator continue with one', async () => {
    const data = clips()
    const out = join(folder, 'later')
    const train = async (steps: number, adversarial?: VaeTrainerOptions['adversarial']) => {
      const model = tinyVae({ train: true })
      const base = { model, data, out, steps, batchSize: 1, crops: [{ size: 16, frames: 1 }] }
      const trainer = new VaeTrainer({ ...base, ...(adversarial ? { adversarial } : {}) })
      const events: TrainEvent[] = []
      for await (const event of trainer.run({ resume: true })) events.push(event)
      trainer.dispose()
      model.dispose()
      return events
    }
    await train(2)
    const discriminator = critic()
    const events = await train(3, { discriminator })
    expect(events[0]).toEqual({ type: 'resume', step: 2 })
    expect(events[1]).toMatchObject({ type: 'step', discriminator: expect.any(Number) })
    expect(existsSync(join(out, 'checkpoint-3', 'discriminator-optimizer.safetensors'))).toBe(true)
    discriminator.dispose()
  })

  it('refuses at once what a term cannot judge, or a discriminator that cannot learn', () => {
    const model = tinyVae({ train: true })
    const lpips = Lpips.create(new Generator(6))
    const wide = PatchDiscriminator.create({ ndf: 4 }, { generator: new Generator(1), train: true })
    const frozen = PatchDiscriminator.create(NARROW, { generator: new Generator(1) })
    const base = { model, data: clips(), out: folder, steps: 1, batchSize: 1 }
    const small = [{ size: 8, frames: 1 }]
    expect(() => new VaeTrainer({ ...base, crops: small, perceptual: { model: lpips } })).toThrow(/16×16/)
    expect(() => new VaeTrainer({ ...base, adversarial: { discriminator: wide, start: 9 } })).toThrow(
      /room for a patch/,
    )
    expect(() => new VaeTrainer({ ...base, adversarial: { discriminator: frozen } })).toThrow(/train: true/)
    for (const t of [model, lpips, wide, frozen]) t.dispose()
  })
})
