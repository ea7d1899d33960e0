import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { makeStages } from '../lib/flow/stages.ts'
import { readConfig } from '../lib/io/pretrained.ts'
import { openWeights, writeSafetensors } from '../lib/io/safetensors.ts'
import { type FluxConfig, PyramidFluxTransformer, type TransformerInputs } from '../lib/models/dit-flux.ts'
import { slice } from '../lib/ops/copy.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { backward, drain, noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import type { Batch } from '../lib/train/batches.ts'
import { pairLoss } from '../lib/train/objective.ts'
import { AdamW, type AdamWOptions } from '../lib/train/optimizer.ts'
import { type PairDraws, trainingPairs } from '../lib/train/pairs.ts'
import { learningRates } from '../lib/train/schedule.ts'
import { Trainer, type TrainerOptions } from '../lib/train/trainer.ts'
import { memorySource } from './fixtures/latent-source.ts'
import { numbers, scramble, tinyDit, tinyText } from './fixtures/tiny.ts'
import { relativeL2 } from './golden.ts'
import { live } from './gradcheck.ts'

const folder = mkdtempSync(join(tmpdir(), 'trainer-modes-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const VIDEO = [16, 4, 8, 8] as const
const videos = memorySource([{ shape: VIDEO, clips: 8 }])
const mixed = memorySource([
  { shape: VIDEO, clips: 8 },
  { shape: [16, 1, 16, 8], clips: 8 },
])

const tiny = tinyDit()
const tinyConfig = tiny.config
tiny.dispose()

/** A trainer of a tiny network whose weights are far from their start, where everything has a gradient. */
function trainerOf(
  options: Partial<TrainerOptions> = {},
  network: Partial<FluxConfig> = {},
): {
  trainer: Trainer
  model: PyramidFluxTransformer
} {
  const model = PyramidFluxTransformer.create({ ...tinyConfig, ...network }, { seed: 3, train: true })
  scramble(model.parameters)
  const trainer = new Trainer({
    ...{ model, data: videos, text: tinyText(), out: folder, steps: 10, batchSize: 8, seed: 3 },
    ...{ captionDrop: 0, ...options },
  })
  return { trainer, model }
}

interface Seen {
  loss: number
  metrics: Record<string, number>
  /** By parameter. */
  gradients: Map<string, Float32Array>
  /** What the network was called with: shapes of all clips of every column. */
  shapes: number[][][]
  /** Their values, and those of the answers. */
  clips: Float32Array[][]
  answers: Float32Array[]
  texts: string[]
}

/** One step's forward and backward, looked at from outside; the trainer is disposed. */
async function seen(
  { trainer, model }: { trainer: Trainer; model: PyramidFluxTransformer },
  batch: Batch = trainer.batch(0),
  step = 0,
): Promise<Seen> {
  let inputs: TransformerInputs | undefined
  let calls = 0
  const kept: Tensor[] = []
  const answers: Tensor[] = []
  const forwardSteps = model.forwardSteps.bind(model)
  model.forwardSteps = function* (given) {
    calls++
    inputs = given
    kept.push(...given.columns.flat().map((t) => keep(t.view(t.shape))))
    const found = yield* forwardSteps(given)
    answers.push(...found.map((t) => keep(t.view(t.shape))))
    return found
  }
  const { loss, metrics } = scope(() => {
    const { loss, metrics = {} } = trainer.forward(step, batch)
    backward(loss)
    return { loss, metrics }
  })
  expect(calls).toBe(1)
  const gradients = new Map<string, Float32Array>()
  for (const [name, p] of model.parameters) gradients.set(name, await p.grad!.floats())
  const { columns } = inputs as TransformerInputs
  const values = await Promise.all(kept.map((t) => t.floats()))
  let at = 0
  const result: Seen = {
    loss: await loss.item(),
    metrics: Object.fromEntries(
      await Promise.all(Object.entries(metrics).map(async ([k, t]) => [k, await t.item()] as const)),
    ),
    gradients,
    shapes: columns.map((clips) => clips.map(({ shape }) => [...shape])),
    clips: columns.map((clips) => clips.map(() => values[at++] as Float32Array)),
    answers: await Promise.all(answers.map((t) => t.floats())),
    texts: [],
  }
  for (const t of [...kept, ...answers, loss, ...Object.values(metrics)]) t.dispose()
  trainer.dispose()
  model.dispose()
  return result
}

describe('whole clips as the target', () => {
  test('are shown at every stage without history', async () => {
    const { shapes, metrics, loss } = await seen(trainerOf({ temporalPyramid: false }))
    const at = (h: number, w: number): number[][] => [[2, 16, 4, h, w]]
    expect(shapes).toEqual([at(2, 2), at(4, 4), at(4, 4), at(8, 8)])
    const { stage0, stage1, stage2 } = metrics as Record<'stage0' | 'stage1' | 'stage2', number>
    // Every sample weighs the same, and half of them are at the middle stage.
    expect(loss).toBeCloseTo((stage0 + 2 * stage1 + stage2) / 4, 5)
  })

  test('have gradients that agree with finite differences', async () => {
    const { trainer, model } = trainerOf({ temporalPyramid: false, causal: false })
    const batch = trainer.batch(0)
    const values = new Map<string, Float32Array>()
    for (const [name, p] of model.parameters) values.set(name, await p.floats())
    scope(() => backward(trainer.forward(0, batch).loss))
    const gradients = new Map<string, Float32Array>()
    for (const [name, p] of model.parameters) gradients.set(name, await p.grad!.floats())
    const lossAt = async (direction: Map<string, Float32Array>, eps: number): Promise<number> => {
      for (const [name, p] of model.parameters) {
        const [v, d] = [values.get(name)!, direction.get(name)!]
        p.write(v.map((x, i) => x + eps * d[i]!))
      }
      const loss = noGrad(() => scope(() => trainer.forward(0, batch).loss))
      const value = await loss.item()
      loss.dispose()
      return value
    }
    for (let seed = 1; seed <= 4; seed++) {
      const direction = new Map([...values].map(([name, v], i) => [name, numbers(v.length, 100 * seed + i)]))
      let expected = 0
      for (const [name, g] of gradients)
        for (const [i, x] of g.entries()) expected += x * direction.get(name)![i]!
      const eps = 2e-3
      const [ahead, back] = [await lossAt(direction, eps), await lossAt(direction, -eps)]
      const found = (ahead - back) / (2 * eps)
      expect(Math.abs(found - expected) / Math.abs(expected), `${found} for ${expected}`).toBeLessThan(1e-2)
    }
    trainer.dispose()
    model.dispose()
  })

  test('may see later frames or not', async () => {
    const losses = await Promise.all(
      [true, false, undefined].map(
        async (causal) =>
          (await seen(trainerOf({ temporalPyramid: false, ...(causal === undefined ? {} : { causal }) })))
            .loss,
      ),
    )
    expect(losses[0]).not.toBe(losses[1])
    // The config's default is causal.
    expect(losses[2]).toBe(losses[0])
  })
})

describe('the temporal pyramid', () => {
  test('pairs long sequences with short ones as the specification lists them', async () => {
    const long = memorySource([{ shape: [16, 16, 8, 8], clips: 4 }])
    const unitsAt = async (rank: number, step: number): Promise<number[]> => {
      const made = trainerOf({ data: long, batchSize: 4, rank, syncGroup: 8 })
      const { shapes } = await seen(made, made.trainer.batch(step), step)
      const frames = shapes.map((clips) => clips.reduce((n, shape) => n + shape[2]!, 0))
      return [frames[0]!, frames[1]!, frames[3]!]
    }
    expect(await unitsAt(0, 0)).toEqual([8, 8, 9])
    expect(await unitsAt(1, 0)).toEqual([7, 7, 10])
    expect(await unitsAt(7, 0)).toEqual([1, 1, 16])
    expect(await unitsAt(0, 1)).toEqual([16, 16, 1])
    expect(await unitsAt(7, 1)).toEqual([9, 9, 8])
  }, 60_000)

  test('cuts clips to the longest length asked for', async () => {
    const made = trainerOf({ maxFrames: 2 })
    for (const step of [0, 1]) {
      const again = trainerOf({ maxFrames: 2 })
      const { shapes } = await seen(again, again.trainer.batch(step), step)
      for (const clips of shapes) expect(clips.reduce((n, s) => n + s[2]!, 0)).toBeLessThanOrEqual(2)
    }
    made.trainer.dispose()
    made.model.dispose()
  })

  test('gives ranks of a group the same clips and draws of their own, and other groups other clips', async () => {
    const clips = (rank: number): readonly number[] => {
      const { trainer, model } = trainerOf({ rank, syncGroup: 2 })
      const { indices } = trainer.batch(0).parts[0]!
      trainer.dispose()
      model.dispose()
      return indices
    }
    expect(clips(0)).toEqual(clips(1))
    expect(clips(0)).not.toEqual(clips(2))
    const same = { syncGroup: 2, temporalPyramid: false }
    const [a, b] = [await seen(trainerOf({ rank: 0, ...same })), await seen(trainerOf({ rank: 1, ...same }))]
    expect(a.loss).not.toBe(b.loss)
  })

  test('trains pyramids of two and of four stages', async () => {
    const four = memorySource([{ shape: [16, 3, 16, 16], clips: 4 }])
    for (const [count, data] of [
      [2, videos],
      [4, four],
    ] as const) {
      const stageRange = Array.from({ length: count + 1 }, (_, k) => k / count)
      const { metrics, shapes } = await seen(
        trainerOf({ stages: makeStages({ stageRange }), data, batchSize: 4 }),
      )
      expect(Object.keys(metrics)).toHaveLength(count)
      expect(shapes).toHaveLength(count)
    }
  })
})

describe('a batch of videos and images', () => {
  const half = { data: mixed, imageRatio: 0.5, batchSize: 8 }

  test('is one packed call without padding', async () => {
    const made = trainerOf(half)
    const batch = made.trainer.batch(2)
    let tokens = 0
    const layout = made.model.layoutSteps.bind(made.model)
    made.model.layoutSteps = function* (inputs) {
      const found = yield* layout(inputs)
      tokens = found.latentTokens
      return found
    }
    const { shapes } = await seen(made, batch, 2)
    expect(shapes).toHaveLength(8)
    expect(shapes.slice(4)).toEqual([4, 8, 8, 16].map((h) => [[1, 16, 1, h, h / 2]]))
    const own = (shape: number[]): number => (shape[0]! * shape[2]! * shape[3]! * shape[4]!) / 4
    expect(tokens).toBe(shapes.flat().reduce((n, shape) => n + own(shape), 0))
  })

  test('answers for its videos as if they were alone', async () => {
    const first = trainerOf(half)
    const batch = first.trainer.batch(2)
    const both = await seen(first, batch, 2)
    const alone = await seen(trainerOf(half), { ...batch, parts: batch.parts.slice(0, 1) }, 2)
    for (const [c, clips] of alone.clips.entries()) expect(both.clips[c]).toEqual(clips)
    for (const [c, v] of alone.answers.entries()) expect(relativeL2(both.answers[c]!, v)).toBeLessThan(1e-5)
  })

  test('may take first frames of videos for images, of which nothing else is seen', async () => {
    const { shapes } = await seen(trainerOf({ imageRatio: 1 }))
    expect(shapes).toEqual([2, 4, 4, 8].map((side) => [[2, 16, 1, side, side]]))
  })
})

describe('options of the pairs', () => {
  const at = 1 // A step with history at every stage but the first.
  const stepOf = async (options: Partial<TrainerOptions>): Promise<Seen> => {
    const made = trainerOf(options)
    return await seen(made, made.trainer.batch(at), at)
  }

  test('corruptRatio changes the history and nothing else', async () => {
    const [none, third] = [await stepOf({ corruptRatio: 0 }), await stepOf({})]
    const withHistory = none.clips.filter((clips) => clips.length > 1)
    expect(withHistory.length).toBeGreaterThan(0)
    none.clips.forEach((clips, c) => {
      expect(third.clips[c]!.at(-1)).toEqual(clips.at(-1))
      for (const [j, clip] of clips.slice(0, -1).entries()) expect(third.clips[c]![j]).not.toEqual(clip)
    })
  })

  test('causal changes the answers and not what the network is given; the saved config says it', async () => {
    const [yes, no] = [await stepOf({ causal: true }), await stepOf({ causal: false })]
    expect(no.clips).toEqual(yes.clips)
    expect(no.loss).not.toBe(yes.loss)
    const { trainer, model } = trainerOf({ causal: false })
    await trainer.save(join(folder, 'bidirectional'))
    expect(readConfig(join(folder, 'bidirectional')).use_temporal_causal).toBe(false)
    trainer.dispose()
    model.dispose()
  })

  test('coupledNoise: false draws other starts and leaves the ends', async () => {
    const pairsOf = async (startNoise: boolean) => {
      const draw = (seed: number): Tensor => Tensor.from(numbers(8 * 16 * 4 * 64, seed), [8, ...VIDEO])
      const made = scope(() => {
        const pairs = trainingPairs(
          draw(1),
          {
            noise: draw(2),
            startNoise: startNoise ? draw(3) : undefined,
            position: () => [0.3, 0.8],
            corruption: () => [0, 0],
            history: (_, __, shape) => Tensor.zeros(shape),
          },
          { stages: makeStages(), columns: [0, 1, 1, 2], unitsPerStage: [2, 2, 2] },
        )
        return {
          noisy: pairs.columns.map((clips) => clips.at(-1)!),
          targets: pairs.targets,
          ratios: pairs.ratios,
        }
      })
      const ends: number[][] = []
      const starts: number[][] = []
      for (const [c, t] of made.noisy.entries()) {
        const [x, v] = [await t.floats(), await made.targets[c]!.floats()]
        // x = r·S + (1 − r)·E and v = S − E.
        const r = (i: number): number => made.ratios[c]![Math.floor((2 * i) / x.length)]!
        ends.push(Array.from(x, (value, i) => value - r(i) * v[i]!))
        starts.push(Array.from(x, (value, i) => value + (1 - r(i)) * v[i]!))
      }
      for (const t of [...made.noisy, ...made.targets]) t.dispose()
      return { ends, starts }
    }
    const [coupled, free] = [await pairsOf(false), await pairsOf(true)]
    coupled.ends.forEach((end, c) => {
      expect(relativeL2(free.ends[c]!, end)).toBeLessThan(1e-5)
      expect(relativeL2(free.starts[c]!, coupled.starts[c]!)).toBeGreaterThan(0.3)
    })
    const [a, b] = [await stepOf({}), await stepOf({ coupledNoise: false })]
    expect(a.loss).not.toBe(b.loss)
    // History has nothing to do with it.
    for (const [c, clips] of a.clips.entries()) expect(b.clips[c]!.slice(0, -1)).toEqual(clips.slice(0, -1))
  })

  test('captionDrop replaces captions by nothing as often as asked', async () => {
    for (const [share, least, most] of [
      [0, 0, 0],
      [0.5, 10, 54],
      [1, 64, 64],
    ] as const) {
      const text = tinyText()
      const encode = text.encode.bind(text)
      const texts: string[] = []
      text.encode = (prompts) => {
        texts.push(...prompts)
        return encode(prompts)
      }
      const { trainer, model } = trainerOf({ text, captionDrop: share })
      for (let step = 0; step < 8; step++)
        noGrad(() => scope(() => trainer.forward(step, trainer.batch(step)))).loss.dispose()
      expect(texts).toHaveLength(64)
      const dropped = texts.filter((t) => t === '').length
      expect(dropped).toBeGreaterThanOrEqual(least)
      expect(dropped).toBeLessThanOrEqual(most)
      trainer.dispose()
      model.dispose()
    }
  })
})

describe('memory and updates', () => {
  test('accumulating two batches gives the gradients of one of both', async () => {
    const [rows, columns] = [8, [0, 1, 1, 2]]
    const values = numbers(rows * 16 * 4 * 64, 4)
    const uniform = (c: number): number[] => Array.from(numbers(2, 50 + c), (x) => (x + 1) / 2)
    const run = async (
      part: 'both' | 0 | 1,
      weight: number,
      model: PyramidFluxTransformer,
    ): Promise<number> => {
      const of = (full: Tensor): Tensor => (part === 'both' ? full : slice(full, 0, 4 * part, 4))
      const some = (u: number[]): number[] => (part === 'both' ? u : [u[part]!])
      const draws: PairDraws = {
        noise: of(Tensor.from(numbers(values.length, 5), [rows, ...VIDEO])),
        position: (c) => some(uniform(c)),
        corruption: (c) => some(uniform(10 + c)),
        history: (c, i, shape) => {
          const size = shape.slice(1).reduce((a, b) => a * b, 1)
          const full = Tensor.from(numbers(2 * size, 60 + 10 * c + i), [2, ...shape.slice(1)])
          return part === 'both' ? full : slice(full, 0, part, 1)
        },
      }
      const captions = [
        'a red circle',
        'a blue square',
        'a red square',
        'a blue circle',
        '',
        'a red',
        'a',
        'blue',
      ]
      const loss = scope(() => {
        const stages = makeStages()
        const units = { stages, columns, unitsPerStage: [2, 3, 3] }
        const pairs = trainingPairs(of(Tensor.from(values, [rows, ...VIDEO])), draws, units)
        const features = tinyText().encode(
          part === 'both' ? captions : captions.slice(4 * part, 4 * part + 4),
        )
        const found = drain(pairLoss({ model, causal: undefined, stages }, { pairs, columns, features })).loss
        backward(found, Tensor.full([1], weight))
        return found
      })
      const value = await loss.item()
      loss.dispose()
      return value
    }
    const gradientsOf = async (
      parts: readonly ('both' | 0 | 1)[],
    ): Promise<[number, Map<string, Float32Array>]> => {
      const model = tinyDit({ train: true })
      scramble(model.parameters)
      let loss = 0
      for (const part of parts) loss += (await run(part, 1 / parts.length, model)) / parts.length
      const gradients = new Map<string, Float32Array>()
      for (const [name, p] of model.parameters) {
        gradients.set(name, await p.grad!.floats())
        p.grad?.dispose()
      }
      model.dispose()
      return [loss, gradients]
    }
    const [whole, gradients] = await gradientsOf(['both'])
    const [halves, others] = await gradientsOf([0, 1])
    expect(halves).toBeCloseTo(whole, 5)
    for (const [name, g] of gradients) {
      const size = Math.hypot(...g)
      if (size > 1e-4) expect(relativeL2(others.get(name)!, g), name).toBeLessThan(1e-4)
    }
  })

  test('accumulation takes consecutive batches for the micro-steps of a step', () => {
    const [plain, double] = [trainerOf(), trainerOf({ accumulate: 2 })]
    expect(double.trainer.batch(1, 0)).toEqual(plain.trainer.batch(2))
    expect(double.trainer.batch(1, 1)).toEqual(plain.trainer.batch(3))
    for (const { trainer, model } of [plain, double]) {
      trainer.dispose()
      model.dispose()
    }
  })

  test('checkpointRatio computes the same from less memory', async () => {
    const peakOf = async (checkpointRatio: number): Promise<[number, Seen]> => {
      const made = trainerOf({ checkpointRatio, batchSize: 32 }, { num_single_layers: 6 })
      expect(made.model.checkpointing).toBe(checkpointRatio || false)
      await engine.idle()
      const before = engine.memory().live
      engine.resetPeak()
      const loss = scope(() => {
        const { loss } = made.trainer.forward(1, made.trainer.batch(1))
        backward(loss)
        return loss
      })
      await engine.idle()
      const peak = engine.memory().peak - before
      loss.dispose()
      made.trainer.optimizer.zeroGrad()
      return [peak, await seen(made, made.trainer.batch(1), 1)]
    }
    const [[all, plain], [less, again]] = [await peakOf(0), await peakOf(1)]
    expect(less).toBeLessThan(0.8 * all)
    expect(again.loss).toBe(plain.loss)
    // Sums of gradients meet in another order.
    for (const [name, g] of plain.gradients)
      expect(relativeL2(again.gradients.get(name)!, g), name).toBeLessThan(1e-5)
  })

  test('parameters that are not given stay as they are, and the saved folder has all', async () => {
    const model = tinyDit({ train: true })
    scramble(model.parameters)
    const parameters = new Map([...model.parameters].filter(([name]) => name.startsWith('proj_out')))
    const before = new Map<string, Float32Array>()
    for (const [name, p] of model.parameters) before.set(name, await p.floats())
    const trainer = new Trainer({
      ...{ model, parameters, data: videos, text: tinyText(), batchSize: 4 },
      ...{ out: join(folder, 'part'), steps: 2, learningRate: 1e-2, warmupSteps: 0 },
    })
    for await (const _ of trainer.run());
    for (const [name, p] of model.parameters) {
      const changed = (await p.floats()).some((v, i) => v !== before.get(name)![i])
      expect(changed, name).toBe(name.startsWith('proj_out'))
    }
    await trainer.save(join(folder, 'part/model'))
    expect([...openWeights(join(folder, 'part/model')).entries.keys()].sort()).toEqual(
      [...model.parameters.keys()].sort(),
    )
    trainer.dispose()
    for (const p of model.parameters.values()) p.grad?.dispose()
    model.dispose()
  })

  test('decay groups go before the rule for biases and vectors, and the first that matches decides', async () => {
    const names = ['a.weight', 'a.bias', 'b.weight', 'b.norm', 'c.weight']
    const make = (options: AdamWOptions): { optimizer: AdamW; parameters: Map<string, Tensor> } => {
      const parameters = new Map(
        names.map((name) => [name, Tensor.full(/weight/.test(name) ? [2, 3] : [6], 1)] as const),
      )
      for (const p of parameters.values()) p.requiresGrad = true
      return { parameters, optimizer: new AdamW(parameters, { weightDecay: 0.1, ...options }) }
    }
    const decayGroups = [
      { match: /^b\./, weightDecay: 0.4 },
      {
        match: (name: string, shape: readonly number[]) => name.startsWith('a') && shape.length === 1,
        weightDecay: 0.2,
      },
      { match: /norm/, weightDecay: 0.9 },
    ]
    const { parameters, optimizer } = make({ decayGroups })
    optimizer.step(0.5).dispose()
    const found = await Promise.all([...parameters.values()].map(async (p) => (await p.floats())[0]!))
    // Without gradients an update is the decay alone: 1 − rate·decay.
    const expected = [0.95, 0.9, 0.8, 0.8, 0.95]
    for (const [i, value] of found.entries()) expect(value, names[i]).toBeCloseTo(expected[i]!, 6)
    // A state is read back under other groups.
    const path = join(folder, 'groups.safetensors')
    await writeSafetensors(path, optimizer.stateTensors())
    const other = make({})
    await other.optimizer.restore(path, 1)
    for (const [i, p] of [...other.parameters.values()].entries())
      expect((await p.floats())[0], names[i]).toBeCloseTo(expected[i]!, 6)
    for (const { optimizer: o, parameters: all } of [{ optimizer, parameters }, other]) {
      o.dispose()
      for (const p of all.values()) p.dispose()
    }
    expect(await live()).toBe(0)
  })
})

test('options that fit nothing are refused by name', () => {
  const model = tinyDit({ train: true })
  const wrong: [Partial<TrainerOptions>, string][] = [
    [{ batchSize: 6 }, 'batchSize'],
    [{ sampleRatios: [1, 2.5, 1] }, 'sampleRatios'],
    [{ imageRatio: 1.5 }, 'imageRatio'],
    [{ checkpointRatio: -1 }, 'checkpointRatio'],
    [{ corruptRatio: Number.NaN }, 'corruptRatio'],
    [{ accumulate: 0 }, 'accumulate'],
    [{ maxFrames: 0 }, 'maxFrames'],
    [{ syncGroup: 9 }, 'syncGroup'],
    [{ rank: -1 }, 'rank'],
    [{ learningRate: 0 }, 'learningRate'],
    [{ steps: 2.5 }, 'steps'],
    [{ schedule: 'cosine', learningRate: 1e-6 }, 'minLearningRate'],
    [{ optimizer: { betas: [0.9, 1] } }, 'betas'],
    [{ optimizer: { decayGroups: [{ match: /a/, weightDecay: -1 }] } }, 'decayGroups[0].weightDecay'],
    [{ data: memorySource([{ shape: [16, 2, 12, 8], clips: 8 }]) }, 'latents of the data set'],
    [{ data: memorySource([{ shape: [4, 2, 8, 8], clips: 8 }]) }, 'latents of the data set'],
  ]
  for (const [options, what] of wrong) {
    const make = (): Trainer =>
      new Trainer({ model, data: videos, text: tinyText(), out: folder, steps: 1, batchSize: 4, ...options })
    expect(make, what).toThrow(
      expect.objectContaining({
        code: expect.stringMatching(/ERR_(OPTION|SHAPE)/),
        message: expect.stringContaining(what),
      }),
    )
  }
  model.dispose()
  for (const kind of ['linear', 'Cosine'] as never[])
    expect(() => learningRates({ learningRate: 1, warmupSteps: 0, totalSteps: 2, kind })).toThrow(
      /constant or cosine/,
    )
})
