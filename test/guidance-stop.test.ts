import { expect, test } from 'vitest'
import type { TransformerInputs } from '../lib/models/velocity-network.ts'
import { axpby } from '../lib/ops/pointwise.ts'
import type { SampledNetwork } from '../lib/sample/stage-run.ts'
import type { Steps } from '../lib/tensor/tape.ts'
import type { Tensor } from '../lib/tensor/tensor.ts'
import { live } from './fixtures/memory.ts'
import { sampledUnits } from './fixtures/sampling.ts'
import { scramble, tinyDit } from './fixtures/tiny.ts'

const STEPS = { steps: [2, 3, 4], videoSteps: [2, 3, 4] }

test('guidance that stops leaves times and the other steps as they are', async () => {
  const network = tinyDit()
  const calls: [number, number][] = []
  const watched: SampledNetwork = {
    latentChannels: network.latentChannels,
    layoutSteps: (inputs) => network.layoutSteps(inputs),
    forwardSteps: (inputs) => {
      calls.push([inputs.text.shape[0] as number, inputs.timesteps[0] as number])
      return network.forwardSteps(inputs)
    },
  }
  const run = async (guidanceStop: number): Promise<[number, number][]> => {
    calls.length = 0
    await sampledUnits(watched, { ...STEPS, frames: 2, guidanceStop })
    return [...calls]
  }
  const all = await run(1)
  expect(all.map(([rows]) => rows)).toEqual(new Array(18).fill(2))
  const some = await run(7 / 9)
  expect(some.map(([rows]) => rows)).toEqual([0, 1].flatMap(() => [2, 2, 2, 2, 2, 2, 2, 1, 1]))
  expect(some.map(([, time]) => time)).toEqual(all.map(([, time]) => time))
  network.dispose()
})

test('a unit equals that with guidance in the steps of it, repeated or not, and no memory stays', async () => {
  // Not packed, so that it can be given values.
  const network = tinyDit({ train: true })
  scramble(network.parameters)
  for (const weight of network.parameters.values()) weight.requiresGrad = false
  const before = await live()
  const of = (more: object): Promise<Float32Array[]> => sampledUnits(network, { ...STEPS, ...more })
  const guided = await of({})
  expect(await of({ guidanceStop: 1 })).toEqual(guided)
  expect(await of({ guidanceStop: 0 })).toEqual(await of({ guided: false }))
  for (const guidanceStop of [5 / 9, 7 / 9]) {
    for (const historyCache of [1, 3]) {
      const stopped = await of({ guidanceStop, historyCache })
      expect(stopped[0]).not.toEqual(guided[0])
      expect(stopped).toEqual(await of({ guidanceStop, historyCache, repeat: false }))
    }
  }
  expect(await live()).toBe(before)
  for (const guided of [true, false]) {
    await expect(of({ guidanceStop: 2, guided })).rejects.toMatchObject({ code: 'ERR_OPTION' })
  }
  network.dispose()
})

test('numbers that are not finite after it name the step of the stage', async () => {
  const network = {
    latentChannels: 16,
    *layoutSteps() {},
    *forwardSteps({ columns, text }: TransformerInputs): Steps<Tensor[]> {
      const x = columns[0]?.at(-1) as Tensor
      const bad = text.shape[0] === 1 ? Number.POSITIVE_INFINITY : 1
      yield
      return [axpby(x, x, bad, -bad)]
    },
  } as unknown as SampledNetwork
  await expect(sampledUnits(network, { ...STEPS, guidanceStop: 7 / 9 })).rejects.toMatchObject({
    code: 'ERR_NUMERICS',
    message: expect.stringContaining('unit 0, stage 2, step 2'),
  })
})
