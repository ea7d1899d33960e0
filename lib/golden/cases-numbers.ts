import { jumpCoefficients } from '../flow/jump.ts'
import { makeStages, type Stages, stageSteps } from '../flow/stages.ts'
import { slice } from '../ops/copy.ts'
import { euler } from '../ops/euler.ts'
import { matmul } from '../ops/matmul.ts'
import { blockNoise, renoise } from '../ops/renoise.ts'
import { upsample } from '../ops/upsample.ts'
import { levelSize, planHistory } from '../pyramid/history.ts'
import { historyClips, latentPyramid, noisePyramid } from '../pyramid/latents.ts'
import { type Layout, makeLayout } from '../pyramid/layout.ts'
import { stageLengths } from '../pyramid/lengths.ts'
import { scope } from '../tensor/scope.ts'
import { noGrad } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { compare, exact, maxAbsolute, relativeL2 } from './compare.ts'
import { Recorded } from './recorded.ts'
import type { CaseContext, CaseRunner, Check } from './types.ts'

// The arithmetic of these cases is a handful of additions, so one tolerance a dtype serves them all.
const TOLERANCE = { f32: 1e-6, bf16: 1e-2 } as const

interface SchedulerConfig {
  num_train_timesteps?: number
  shift?: number
  stage_range?: number[]
  gamma?: number
}

/**
 * The schedule that a recorded scheduler configuration describes; absent fields have the published values. `count`
 * gives the number of equal stages where only that is known.
 */
export function stagesOf(config: SchedulerConfig, count = 3): Stages {
  return makeStages({
    stageRange: Array.from({ length: count + 1 }, (_, k) => k / count),
    ...(config.num_train_timesteps === undefined ? {} : { trainTimesteps: config.num_train_timesteps }),
    ...(config.shift === undefined ? {} : { shift: config.shift }),
    ...(config.stage_range === undefined ? {} : { stageRange: config.stage_range }),
    ...(config.gamma === undefined ? {} : { gamma: config.gamma }),
  })
}

const expected = (r: Recorded, name: string) => ({ values: r.floats(name), shape: r.shape(name) })

/** Schedule tables, inference steps and Euler chains. */
export const runScheduler: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const stages = stagesOf(json.config)
  const checks: Check[] = []
  const within = (name: string, actual: ArrayLike<number>, table: ArrayLike<number>, tolerance: number) =>
    checks.push({ name: `${name} (absolute)`, error: maxAbsolute(actual, table), tolerance })

  within('global sigmas', stages.globalSigmas, r.floats('global_sigmas'), 1e-6)
  within('global timesteps', stages.globalTimesteps, r.floats('global_timesteps'), 1e-3)
  const { scalars } = json
  const perStage = (record: Record<string, number>) => stages.start.map((_, k) => record[k] as number)
  within('start sigmas', stages.start, perStage(scalars.start_sigmas), 1e-6)
  within('end sigmas', stages.end, perStage(scalars.end_sigmas), 1e-6)
  within('original start sigmas', stages.originalStart, perStage(scalars.ori_start_sigmas), 1e-6)
  for (let k = 0; k < stages.count; k++) {
    within(
      `timestep ratios of stage ${k}`,
      stages.timestepRatios[k] as readonly number[],
      scalars.timestep_ratios[k],
      1e-6,
    )
    within(
      `sigmas of stage ${k}`,
      stages.sigmasPerStage[k] as Float64Array,
      r.doubles(`sigmas_per_stage.${k}`),
      1e-6,
    )
    within(
      `timesteps of stage ${k}`,
      stages.timestepsPerStage[k] as Float64Array,
      r.doubles(`timesteps_per_stage.${k}`),
      1e-3,
    )
  }
  for (const name of r.names) {
    const match = /^(set_timesteps\.n(\d+)\.stage(\d+))\.timesteps$/.exec(name)
    if (!match) continue
    const steps = stageSteps(stages, Number(match[3]), Number(match[2]))
    within(match[1] as string, steps.timesteps, r.doubles(name), 1e-3)
    within(match[1] as string, steps.sigmas, r.doubles(`${match[1]}.sigmas`), 1e-6)
  }
  for (const [i, { n, stage }] of (json.step_chains as { n: number; stage: number }[]).entries()) {
    checks.push(await eulerChain(r, `step_chain.${i}`, stageSteps(stages, stage, n).sigmas))
  }
  return checks
}

async function eulerChain(r: Recorded, name: string, sigmas: Float64Array): Promise<Check> {
  const samples = noGrad(() =>
    scope(() => {
      const outputs = r.tensor(`${name}.model_outputs`)
      let x = r.tensor(`${name}.x0`)
      return Array.from({ length: sigmas.length - 1 }, (_, n) => {
        const v = outputs.view(x.shape, n * x.size)
        x = euler(x, v, null, { deltaSigma: (sigmas[n + 1] as number) - (sigmas[n] as number), guidance: 1 })
        return x
      })
    }),
  )
  const mine = await joined(samples)
  return { name, error: relativeL2(mine, r.floats(`${name}.samples`)), tolerance: TOLERANCE.f32 }
}

async function joined(tensors: readonly Tensor[]): Promise<Float32Array> {
  const parts = await Promise.all(tensors.map((t) => t.floats()))
  const all = new Float32Array(parts.reduce((n, part) => n + part.length, 0))
  let at = 0
  for (const part of parts) {
    all.set(part, at)
    at += part.length
  }
  for (const t of tensors) t.dispose()
  return all
}

/** Latent pyramid, noise pyramid and nearest upsampling, odd sizes included. */
export const runPyramid: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const checks: Check[] = []
  for (const i of (json.config.inputs as number[][]).keys()) {
    const levels = r.names.filter((name) => name.startsWith(`${i}.pyramid.`)).length
    const made = scope(() => {
      const x = r.tensor(`${i}.x`, ctx.dtype)
      const noise = noisePyramid(x, levels)
      return { latents: latentPyramid(x, levels), noise, up: upsample(noise[0] as Tensor) }
    })
    for (let j = 0; j < levels; j++) {
      const name = `${i}.pyramid.${j}`
      checks.push(await compare(name, made.latents[j] as Tensor, expected(r, name), TOLERANCE[ctx.dtype]))
    }
    for (let j = 0; j < levels - 1; j++) {
      const name = `${i}.noise_down.${j}`
      checks.push(
        await compare(name, made.noise[levels - 2 - j] as Tensor, expected(r, name), TOLERANCE[ctx.dtype]),
      )
    }
    checks.push(await compare(`${i}.upsampled`, made.up, expected(r, `${i}.upsampled`), TOLERANCE[ctx.dtype]))
    for (const t of [...made.latents, ...made.noise, made.up]) t.dispose()
  }
  return checks
}

/** α, β and the re-noised latent of every jump, with the recorded block noise. */
export const runStageJump: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const checks: Check[] = []
  for (const { index, scheduler, coefficients } of json.cases) {
    const stages = stagesOf(scheduler)
    let x = r.tensor(`${index}.x`, ctx.dtype)
    for (const { stage, alpha, beta } of coefficients) {
      const jump = jumpCoefficients(stages, stage)
      const name = `${index}.renoised.${stage}`
      checks.push({
        name: `${index}: α, β of stage ${stage} (absolute)`,
        error: maxAbsolute([jump.alpha, jump.beta], [alpha, beta]),
        tolerance: TOLERANCE.f32,
      })
      const before = x
      x = scope(() =>
        renoise(before, {
          ...jump,
          noise: r.tensor(`${index}.block_noise.${stage}`, ctx.dtype),
          seed: 0,
          stream: 0,
        }),
      )
      before.dispose()
      checks.push(await compare(name, x, expected(r, name), TOLERANCE[ctx.dtype]))
    }
    x.dispose()
  }
  return checks
}

/** Theory, the recorded factorisation, and the covariance of our own sampler over a million blocks. */
export const runBlockNoise: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const checks: Check[] = []
  for (const [i, gamma] of (json.gammas as number[]).entries()) {
    const theory = Array.from({ length: 16 }, (_, n) => (n % 5 === 0 ? 1 : -gamma))
    checks.push({
      name: `${i}: (1 + γ)I − γJ (absolute)`,
      error: maxAbsolute(theory, r.doubles(`${i}.theoretical`)),
      tolerance: 1e-12,
    })
    const [product, blocks] = scope(() => {
      const factor = r.tensor(`${i}.cholesky_f32`)
      return [
        matmul(factor, factor, { transB: true }),
        matmul(r.tensor(`${i}.eps`), factor, { transB: true }),
      ]
    }) as [Tensor, Tensor]
    checks.push({
      name: `${i}: L·Lᵀ (absolute)`,
      error: maxAbsolute(await product.floats(), theory),
      tolerance: TOLERANCE.f32,
    })
    checks.push(await compare(`${i}: ε·Lᵀ`, blocks, expected(r, `${i}.noise_blocks`), TOLERANCE.f32))
    product.dispose()
    blocks.dispose()
    checks.push({
      name: `${i}: covariance of 2²⁰ sampled blocks (absolute)`,
      error: await sampledCovarianceError(gamma, i, theory),
      tolerance: 1e-2,
    })
  }
  return checks
}

async function sampledCovarianceError(
  gamma: number,
  stream: number,
  theory: readonly number[],
): Promise<number> {
  const size = 2048
  const noise = blockNoise([1, 1, 1, size, size], { gamma, seed: 20241008, stream })
  const z = await noise.floats()
  noise.dispose()
  const sums = new Float64Array(16)
  // Products with the block to the right: blocks must be independent of each other.
  const across = new Float64Array(16)
  const half = size / 2
  for (let y = 0; y < half; y++) {
    for (let x = 0; x < half; x++) {
      const at = 2 * y * size + 2 * x
      const next = 2 * y * size + 2 * ((x + 1) % half)
      for (let a = 0; a < 4; a++) {
        const va = z[at + (a >> 1) * size + (a & 1)] as number
        for (let b = 0; b < 4; b++) {
          const offset = (b >> 1) * size + (b & 1)
          sums[4 * a + b] = (sums[4 * a + b] as number) + va * (z[at + offset] as number)
          across[4 * a + b] = (across[4 * a + b] as number) + va * (z[next + offset] as number)
        }
      }
    }
  }
  const blocks = half * half
  const zeros = new Array<number>(16).fill(0)
  const scaled = (v: Float64Array) => v.map((sum) => sum / blocks)
  return Math.max(maxAbsolute(scaled(sums), theory), maxAbsolute(scaled(across), zeros))
}

interface RecordedUnit {
  unit: number
  stages: { frames: number[]; level: number; shape_thw: number[] }[][]
}

/** The history of every unit: which frames at which resolution, and the tensors themselves. */
export const runHistory: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const { frame_per_unit: f, latent_height: height, latent_width: width } = json.config
  const count: number = json.config.stages.length
  const checks: Check[] = []
  const clean = r.tensor('clean_latents', ctx.dtype)
  for (const { unit, stages } of json.plan as RecordedUnit[]) {
    const plans = stages.map((_, stage) => planHistory(unit, stage, count, f))
    const described = plans.map((plan) =>
      plan.map(({ firstFrame, frameCount, level }) => {
        const size = levelSize(height, width, level, count)
        return {
          frames: Array.from({ length: frameCount }, (_, i) => firstFrame + i),
          level,
          shape_thw: [frameCount, size.height, size.width],
        }
      }),
    )
    checks.push(exact(`plan of unit ${unit} (exact)`, described, stages))
    if (!r.has(`unit${unit}.stage0.piece0`)) continue
    const clips = scope(() => {
      const pyramid = latentPyramid(slice(clean, 2, 0, 1 + (unit - 1) * f), count)
      return plans.map((plan) => historyClips(pyramid, plan))
    })
    for (const [stage, pieces] of clips.entries()) {
      for (const [p, clip] of pieces.entries()) {
        const name = `unit${unit}.stage${stage}.piece${p}`
        checks.push(await compare(name, clip, expected(r, name), TOLERANCE[ctx.dtype]))
        clip.dispose()
      }
    }
  }
  clean.dispose()
  return checks
}

interface LayoutSample {
  index: number
  batch_per_stage: number
  samples_thw: [number, number, number][][]
  hidden_length: number[]
  trainable_tokens: number[]
}

/** Position ids, rotary tables and attention masks of packed calls. */
export const runLayout: CaseRunner = async (dir, json, ctx: CaseContext) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const headAxes: number[] = json.axes_dims_rope ?? json.config?.axes_dims_rope ?? rotaryAxes(r, json.cases)
  const checks: Check[] = []
  for (const sample of json.cases as LayoutSample[]) {
    for (const causal of [true, false]) {
      const layout = makeLayout({
        columns: sample.samples_thw.map((clips) => ({
          clips: clips.map(([frames, height, width]) => ({ frames, height, width })),
        })),
        batch: sample.batch_per_stage,
        textLength: r.shape(`${sample.index}.text_mask`)[1] as number,
        textMask: r.integers(`${sample.index}.text_mask`),
        headAxes,
        causal,
      })
      if (causal) checks.push(...positionChecks(r, sample, layout, headAxes))
      checks.push(maskCheck(r, sample.index, layout, causal ? 'causal' : 'full'))
    }
  }
  return checks
}

// Channels of each axis are not in the file: where only time has moved, the other axes' pairs are not rotated.
function rotaryAxes(r: Recorded, samples: readonly LayoutSample[]): number[] {
  for (const { index } of samples) {
    const ids = r.floats(`${index}.ids.stage0`)
    const [, tokens, axes] = r.shape(`${index}.ids.stage0`) as [number, number, number]
    const [, length, , pairs] = r.shape(`${index}.rotary.stage0`) as [number, number, number, number]
    if (axes === 1) return [2 * pairs]
    const rotary = r.floats(`${index}.rotary.stage0`)
    for (let i = 0; i < tokens; i++) {
      if (!(ids[3 * i] && !ids[3 * i + 1] && !ids[3 * i + 2])) continue
      const at = (length - tokens + i) * pairs * 4
      let time = pairs
      while (time > 0 && rotary[at + 4 * (time - 1)] === 1 && rotary[at + 4 * (time - 1) + 2] === 0) time--
      return [2 * time, pairs - time, pairs - time]
    }
  }
  return [16, 24, 24]
}

function sequences(layout: Layout): { c: number; b: number; joint: number[]; latent: number[] }[] {
  return layout.columns.flatMap(({ tokens }, c) =>
    Array.from({ length: layout.batch }, (_, b) => {
      const row = b * layout.columns.length + c
      const text = Array.from({ length: layout.textLength }, (_, i) => row * layout.textLength + i)
      const latent = Array.from({ length: tokens }, (_, i) => layout.latentIndexOf(c, b, i))
      return { c, b, latent, joint: [...text, ...latent.map((i) => layout.textTokens + i)] }
    }),
  )
}

function positionChecks(
  r: Recorded,
  sample: LayoutSample,
  layout: Layout,
  headAxes: readonly number[],
): Check[] {
  const half = headAxes.reduce((n, d) => n + d, 0) / 2
  let ids = 0
  let angles = 0
  for (const { c, b, joint, latent } of sequences(layout)) {
    const key = `${sample.index}.ids.stage${c}`
    const axes = r.shape(key)[2] as number
    const size = latent.length * axes
    const mine = latent.flatMap((row) => [...layout.ids.subarray(row * 3, row * 3 + axes)])
    ids = Math.max(ids, maxAbsolute(mine, r.floats(key).subarray(b * size, (b + 1) * size)))
    const rotary = r.floats(`${sample.index}.rotary.stage${c}`)
    joint.forEach((row, i) => {
      for (let p = 0; p < half; p++) {
        const cos = layout.jointCos[row * half + p] as number
        const sin = layout.jointSin[row * half + p] as number
        const at = ((b * joint.length + i) * half + p) * 4
        angles = Math.max(angles, maxAbsolute([cos, -sin, sin, cos], rotary.subarray(at, at + 4)))
      }
    })
  }
  const { index } = sample
  return [
    exact(
      `${index}: token counts (exact)`,
      [layout.columns.map((column) => column.tokens), layout.predictionTokens.map((p) => p.count)],
      [sample.hidden_length, sample.trainable_tokens],
    ),
    { name: `${index}: position ids (absolute)`, error: ids, tolerance: 1e-5 },
    { name: `${index}: rotations (absolute)`, error: angles, tolerance: 1e-5 },
  ]
}

function maskCheck(r: Recorded, index: number, layout: Layout, kind: 'causal' | 'full'): Check {
  let wrong = 0
  const { segment, order } = layout
  for (const { c, b, joint } of sequences(layout)) {
    const mask = r.integers(`${index}.mask.${kind}.stage${c}`)
    joint.forEach((i, row) => {
      joint.forEach((j, column) => {
        const sees = segment[i] === segment[j] && (order[i] as number) >= (order[j] as number) ? 1 : 0
        if (sees !== mask[(b * joint.length + row) * joint.length + column]) wrong++
      })
    })
  }
  return { name: `${index}: ${kind} mask (wrong entries)`, error: wrong, tolerance: 0 }
}

/** Units per stage over successive training steps. */
export const runStageLengths: CaseRunner = async (_dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  return json.table.map((row: Record<string, number | null> & { first_four_calls: number[][] }) => {
    const calls = row.first_four_calls.map((lengths, i) =>
      stageLengths({
        maxFrames: row.max_temporal_length as number,
        framesPerUnit: row.frame_per_unit as number,
        syncGroup: row.video_sync_group as number,
        rank: row.rank as number,
        counter: i + 1,
        batchUnits: row.max_units ?? undefined,
        stageCount: lengths.length,
      }),
    )
    const name = `max ${row.max_temporal_length}, group ${row.video_sync_group}, rank ${row.rank}, units ${row.max_units}`
    return exact(`${name} (exact)`, calls, row.first_four_calls)
  })
}
