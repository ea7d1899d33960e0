import { describe, expect, it } from 'vitest'
import { coupleCoefficients, drawPosition } from '../lib/flow/couple.ts'
import { guidanceForUnit, guidedSteps } from '../lib/flow/guidance.ts'
import { jumpCoefficients } from '../lib/flow/jump.ts'
import { makeStages, type StageOptions, stageSteps } from '../lib/flow/stages.ts'
import { frameTokens, historyTokens } from '../lib/pyramid/history.ts'
import { golden, maxAbsolute, relativeL2 } from './golden.ts'

const schedulers = ['scheduler_0', 'scheduler_1', 'scheduler_2', 'scheduler_3']

function stagesOf(config: { [key: string]: unknown }): ReturnType<typeof makeStages> {
  const options: { -readonly [K in keyof StageOptions]: StageOptions[K] } = {}
  if (config.num_train_timesteps !== undefined) options.trainTimesteps = config.num_train_timesteps as number
  if (config.shift !== undefined) options.shift = config.shift as number
  if (config.stage_range !== undefined) options.stageRange = config.stage_range as number[]
  if (config.gamma !== undefined) options.gamma = config.gamma as number
  return makeStages(options)
}

describe.each(schedulers)('the schedule of %s', (name) => {
  const { json, tensors } = golden(name)
  const stages = stagesOf(json.config)
  const doubles = (key: string): Float64Array => tensors.readArray(key) as Float64Array

  it('has the recorded global tables bit for bit', () => {
    expect(maxAbsolute(stages.globalSigmas, tensors.readFloats('global_sigmas'))).toBe(0)
    expect(maxAbsolute(stages.globalTimesteps, tensors.readFloats('global_timesteps'))).toBe(0)
  })

  it('has the recorded stage boundaries to 1e-9', () => {
    expect(stages.count).toBe(json.config.stages)
    for (let k = 0; k < stages.count; k++) {
      expect(Math.abs(stages.start[k] - json.scalars.start_sigmas[k])).toBeLessThan(1e-9)
      expect(Math.abs(stages.end[k] - json.scalars.end_sigmas[k])).toBeLessThan(1e-9)
      expect(Math.abs(stages.originalStart[k] - json.scalars.ori_start_sigmas[k])).toBeLessThan(1e-9)
      expect(maxAbsolute(stages.timestepRatios[k], json.scalars.timestep_ratios[k])).toBeLessThan(1e-9)
    }
  })

  it('has the recorded training tables to 1e-9', () => {
    for (let k = 0; k < stages.count; k++) {
      expect(maxAbsolute(stages.timestepsPerStage[k], doubles(`timesteps_per_stage.${k}`))).toBeLessThan(1e-9)
      expect(maxAbsolute(stages.sigmasPerStage[k], doubles(`sigmas_per_stage.${k}`))).toBeLessThan(1e-9)
    }
  })

  it('gives the recorded inference steps to 1e-9', () => {
    const cases = [...tensors.entries.keys()].filter((key) => /^set_timesteps.*\.timesteps$/.test(key))
    expect(cases.length).toBeGreaterThanOrEqual(6 * stages.count)
    for (const key of cases) {
      const [, count, k] = /n(\d+)\.stage(\d+)/.exec(key) as unknown as [string, string, string]
      const steps = stageSteps(stages, Number(k), Number(count))
      expect(maxAbsolute(steps.timesteps, doubles(key))).toBeLessThan(1e-9)
      expect(maxAbsolute(steps.sigmas, doubles(key.replace(/timesteps$/, 'sigmas')))).toBeLessThan(1e-9)
    }
  })

  it('moves a sample along the recorded Euler chains', () => {
    json.step_chains.forEach(({ n, stage }: { n: number; stage: number }, c: number) => {
      const outputs = tensors.readFloats(`step_chain.${c}.model_outputs`)
      const samples = tensors.readFloats(`step_chain.${c}.samples`)
      let x = tensors.readFloats(`step_chain.${c}.x0`)
      const { sigmas } = stageSteps(stages, stage, n)
      for (let step = 0; step < n; step++) {
        const v = outputs.subarray(step * x.length, (step + 1) * x.length)
        x = x.map((value, i) => value + (sigmas[step + 1] - sigmas[step]) * v[i])
        expect(relativeL2(x, samples.subarray(step * x.length, (step + 1) * x.length))).toBeLessThan(1e-6)
      }
    })
  })
})

describe('stages', () => {
  const stages = makeStages()

  it('agree with the published values of the default schedule', () => {
    expect(maxAbsolute(stages.start, [1, 0.80023995, 0.50074962])).toBeLessThan(1e-6)
    expect(maxAbsolute(stages.end, [0.667, 0.334, 0])).toBeLessThan(1e-6)
    expect([...stages.timestepsPerStage].map((table) => table[0])).toEqual([1000, 744, 386])
    expect(
      maxAbsolute(
        [...stages.timestepsPerStage].map((t) => t[999]),
        [744.256, 386.358, 1.385],
      ),
    ).toBeLessThan(1e-6)
    const steps = stageSteps(stages, 0, 10)
    expect(maxAbsolute(steps.timesteps.subarray(0, 4), [1000, 971.584, 943.168, 914.752])).toBeLessThan(1e-6)
    expect(maxAbsolute(steps.sigmas.subarray(8), [0.112, 0.001, 0])).toBeLessThan(1e-6)
    expect(
      maxAbsolute(stageSteps(stages, 2, 5).timesteps, [386, 289.84625, 193.6925, 97.53875, 1.385]),
    ).toBeLessThan(1e-6)
  })

  it('sum their Euler increments to minus one for any number of steps', () => {
    for (const count of [1, 2, 3, 28, 1000]) {
      const { sigmas } = stageSteps(stages, 1, count)
      let sum = 0
      for (let n = 0; n < count; n++) sum += sigmas[n + 1] - sigmas[n]
      expect(Math.abs(sum + 1)).toBeLessThan(1e-12)
    }
  })

  it('work for one stage and for five', () => {
    expect(makeStages({ stageRange: [0, 1] })).toMatchObject({ count: 1, start: [1], end: [0] })
    const five = makeStages({ stageRange: [0, 0.2, 0.4, 0.6, 0.8, 1] })
    expect(five.count).toBe(5)
    for (let k = 1; k < 5; k++) expect(five.start[k]).toBeGreaterThan(five.end[k - 1])
  })

  it('are frozen', () => {
    expect(Object.isFrozen(stages) && Object.isFrozen(stages.start)).toBe(true)
  })

  it.each([
    { trainTimesteps: 0 },
    { trainTimesteps: 10.5 },
    { shift: 0 },
    { shift: Number.NaN },
    { gamma: 0 },
    { gamma: 0.5 },
    { stageRange: [0] },
    { stageRange: [0, 0.5] },
    { stageRange: [0, 0.7, 0.3, 1] },
  ])('refuse %o', (options) => {
    expect(() => makeStages(options)).toThrow(expect.objectContaining({ code: 'ERR_OPTION' }))
  })

  it('refuse a stage or step count that does not exist', () => {
    expect(() => stageSteps(stages, 3, 4)).toThrow(/0 to 2/)
    expect(() => stageSteps(stages, 0, 0)).toThrow(/from 1/)
  })
})

describe('the jump between stages', () => {
  it('has the recorded coefficients', () => {
    for (const recorded of golden('stage_jump').json.cases) {
      const stages = stagesOf(recorded.scheduler)
      for (const { stage, alpha, beta } of recorded.coefficients) {
        const jump = jumpCoefficients(stages, stage)
        expect(Math.abs(jump.alpha - alpha)).toBeLessThan(1e-12)
        expect(Math.abs(jump.beta - beta)).toBeLessThan(1e-12)
        expect(jump.gamma).toBe(stages.gamma)
      }
    }
  })

  it('has the published coefficients of the default schedule', () => {
    const stages = makeStages()
    const values = [1, 2].flatMap((k) => [
      jumpCoefficients(stages, k).alpha,
      jumpCoefficients(stages, k).beta,
    ])
    expect(maxAbsolute(values, [0.5998800255, 0.6930281249, 0.7496251922, 0.433661888])).toBeLessThan(1e-9)
  })

  it('turns the end of one stage into the start of the next in mean and covariance', () => {
    for (const options of [{}, { shift: 3 }, { gamma: 0.2, stageRange: [0, 0.25, 0.5, 0.75, 1] }]) {
      const stages = makeStages(options)
      for (let k = 1; k < stages.count; k++) {
        const { alpha, beta, gamma } = jumpCoefficients(stages, k)
        const before = coupleCoefficients(stages, k - 1)
        const after = coupleCoefficients(stages, k)
        // Up2 makes the noise of a block equal, so diagonal and off-diagonal share its variance (eq. 19–21).
        const carried = (alpha * before.endNoise) ** 2
        expect(Math.abs(alpha * before.endData - after.startData)).toBeLessThan(1e-9)
        expect(Math.abs(carried + beta ** 2 - after.startNoise ** 2)).toBeLessThan(1e-9)
        expect(Math.abs(carried - gamma * beta ** 2)).toBeLessThan(1e-12)
      }
    }
  })

  it('does not exist for stage 0', () => {
    expect(() => jumpCoefficients(makeStages(), 0)).toThrow(/pure noise/)
  })
})

describe('training pairs', () => {
  const stages = makeStages()

  it('start from noise at stage 0 and end at data at the last stage', () => {
    expect(coupleCoefficients(stages, 0)).toMatchObject({ startNoise: 1, startData: 0 })
    expect(coupleCoefficients(stages, 2)).toMatchObject({ endNoise: 0, endData: 1 })
    expect(coupleCoefficients(stages, 1).startNoise).toBe(stages.start[1])
    expect(coupleCoefficients(stages, 1).endNoise).toBe(stages.end[1])
  })

  it('are solved exactly by Euler steps along their own velocity', () => {
    for (let k = 0; k < 3; k++) {
      const { startNoise, startData, endNoise, endData } = coupleCoefficients(stages, k)
      const [noise, lower, data] = [0.7, -1.3, 0.4]
      const start = startNoise * noise + startData * lower
      const end = endNoise * noise + endData * data
      for (const count of [1, 7, 20]) {
        const { sigmas } = stageSteps(stages, k, count)
        let x = start
        for (let n = 0; n < count; n++) x += (sigmas[n + 1] - sigmas[n]) * (start - end)
        expect(Math.abs(x - end)).toBeLessThan(1e-12)
      }
    }
  })

  it('are drawn at table positions, the last one for a draw of almost 1', () => {
    expect(drawPosition(0, stages, 1)).toEqual({ index: 0, ratio: 1, timestep: 744 })
    expect(drawPosition(0.9999999, stages, 1).index).toBe(999)
    expect(drawPosition(1, stages, 1).index).toBe(999)
    const middle = drawPosition(0.5, stages, 2)
    expect(middle.index).toBe(500)
    expect(middle.timestep).toBe(stages.timestepsPerStage[2][500])
    expect(() => drawPosition(-0.1, stages, 0)).toThrow(/\[0, 1\)/)
  })
})

describe('guidance', () => {
  const scales = { guidanceScale: 7, videoGuidanceScale: 5 }

  it('uses the image scale for the first unit of t2v only', () => {
    expect([0, 1, 9].map((u) => guidanceForUnit(u, scales))).toEqual([7, 5, 5])
    expect(() => guidanceForUnit(-1, scales)).toThrow(/from 0/)
    const perUnit = [6, 4, 3]
    expect([0, 1, 2, 9].map((u) => guidanceForUnit(u, { ...scales, perUnit }))).toEqual([6, 4, 3, 3])
    expect(() => guidanceForUnit(0, { ...scales, perUnit: [] })).toThrow(/one a unit/)
  })

  it('falls linearly to its minimum when asked', () => {
    const linear = { alpha: 0.5, min: 2 }
    const of = (u: number): number => guidanceForUnit(u, { ...scales, linear })
    expect([0, 1, 4, 10, 30].map(of)).toEqual([7, 6.5, 5, 2, 2])
  })
})

describe('guided steps', () => {
  it('come first, and are a share of all of a unit', () => {
    expect(guidedSteps([10, 10, 10], 1)).toEqual([10, 10, 10])
    expect(guidedSteps([10, 10, 10], 2 / 3)).toEqual([10, 10, 0])
    expect(guidedSteps([10, 10, 10], 0.75)).toEqual([10, 10, 3])
    expect(guidedSteps([4, 2, 3], 0.2)).toEqual([2, 0, 0])
    expect(guidedSteps([4, 2, 3], 0)).toEqual([0, 0, 0])
    for (const stop of [-0.1, 1.1, Number.NaN]) expect(() => guidedSteps([1], stop)).toThrow(/guidanceStop/)
  })
})

describe('the token bill', () => {
  const rows768 = {
    1: [480, 1920, 7680],
    2: [720, 2160, 8640],
    3: [960, 2400, 8880],
    7: [1920, 3360, 9840],
    15: [3840, 5280, 11760],
    30: [7440, 8880, 15360],
  }
  const rows384 = {
    1: [120, 480, 1920],
    2: [180, 540, 2160],
    3: [240, 600, 2220],
    7: [480, 840, 2460],
    15: [960, 1320, 2940],
    30: [1860, 2220, 3840],
  }

  it.each([
    ['768p', 96, 160, { 0: [240, 960, 3840], ...rows768 }],
    ['384p', 48, 80, { 0: [60, 240, 960], ...rows384 }],
  ])('matches the published table at %s', (_name, height, width, table) => {
    for (const [unit, row] of Object.entries(table)) {
      const totals = [0, 1, 2].map(
        (stage) => historyTokens({ unit: Number(unit), stage, height, width }).total,
      )
      expect(totals, `unit ${unit}`).toEqual(row)
    }
  })

  it('is 15,360 for the last unit of 10 s at 768p where full-sequence diffusion pays 119,040', () => {
    const pyramid = historyTokens({ unit: 30, stage: 2, height: 96, width: 160 }).total
    const fullSequence = 31 * frameTokens(96, 160, 2, 3)
    console.log(`10 s at 768p: ${pyramid} tokens in the pyramid, ${fullSequence} in full sequence`)
    expect(pyramid).toBe(15360)
    expect(fullSequence).toBe(119040)
  })
})
