import { normaliseLatents } from '../flow/normalise.ts'
import { openWeights } from '../io/safetensors.ts'
import { loadVelocityNetwork } from '../models/load-network.ts'
import { concat, slice } from '../ops/copy.ts'
import { mse } from '../ops/mse.ts'
import { mean } from '../ops/reduce.ts'
import { stageLengths } from '../pyramid/lengths.ts'
import { unitsInClip } from '../pyramid/units.ts'
import { scope } from '../tensor/scope.ts'
import { backward, clearTape, noGrad } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { AdamW } from '../train/optimizer.ts'
import { type TrainingPairs, trainingPairs } from '../train/pairs.ts'
import { learningRates } from '../train/schedule.ts'
import { stagesOf } from './cases-numbers.ts'
import {
  compare,
  compareGradients,
  exact,
  maxAbsolute,
  relativeL2,
  sampleIndices,
  scalar,
} from './compare.ts'
import { Recorded, readCase } from './recorded.ts'
import type { CaseRunner, Check } from './types.ts'

const PAIRS = 1e-6
const LOSS = 1e-5
const PREDICTIONS = 1e-5
const GRADIENTS = 1e-4
const ADAMW_LOSSES = 1e-4
const ADAMW_UPDATES = 1e-2

const expected = (r: Recorded, name: string) => ({ values: r.floats(name), shape: r.shape(name) })

/** Column → stage: ratios [1, 2, 1] give [0, 1, 1, 2]. */
const columnsOf = (ratios: readonly number[]): number[] =>
  ratios.flatMap((n, k) => new Array<number>(n).fill(k))

interface PairCase {
  ratios: readonly number[]
  unitsPerStage?: readonly number[] | null
  framesPerUnit?: number
  corruptRatio?: number
  gamma?: number
  shift?: number
  stage_range?: number[]
}

/** Pairs of normalised latents with every recorded draw in place of our own. */
function replayPairs(r: Recorded, latents: Tensor, setting: PairCase): TrainingPairs {
  const { unitsPerStage, framesPerUnit, corruptRatio, ratios, ...scheduler } = setting
  return trainingPairs(
    latents,
    {
      noise: r.tensor('draw.noise'),
      position: (c) => r.floats(`draw.u.${c}`),
      corruption: (c) => r.floats(`draw.corrupt_u.${c}`),
      history: (c, i) => r.tensor(`draw.cond_noise.${c}.${i}`),
    },
    {
      stages: stagesOf(scheduler, ratios.length),
      columns: columnsOf(ratios),
      unitsPerStage: unitsPerStage ?? undefined,
      framesPerUnit: framesPerUnit ?? 1,
      corruptRatio: corruptRatio ?? 1 / 3,
    },
  )
}

async function pairChecks(r: Recorded, pairs: TrainingPairs): Promise<Check[]> {
  const checks: Check[] = []
  const count = pairs.columns.length
  for (const [c, clips] of pairs.columns.entries()) {
    const recorded = r.names.filter((name) => name.startsWith(`noisy.${c}.`)).length
    checks.push(exact(`clips of column ${c} (exact)`, clips.length, recorded))
    for (const [j, clip] of clips.entries()) {
      if (j >= recorded) continue
      checks.push(await compare(`noisy.${c}.${j}`, clip, expected(r, `noisy.${c}.${j}`), PAIRS))
    }
    const target = pairs.targets[c] as Tensor
    checks.push(await compare(`targets.${c}`, target, expected(r, `targets.${c}`), PAIRS))
    const list = (name: string, values: readonly number[]): Check => ({
      name,
      error: relativeL2(values, r.floats(name)),
      tolerance: PAIRS,
    })
    checks.push(list(`ratios.${c}`, pairs.ratios[c] as number[]))
    checks.push(
      list(
        `timesteps.${c}`,
        pairs.timesteps.filter((_, row) => row % count === c),
      ),
    )
  }
  return checks
}

function disposePairs(pairs: TrainingPairs): void {
  for (const t of [...pairs.columns.flat(), ...pairs.targets]) t.dispose()
}

/** Noisy clips, corrupted history, targets and timesteps of one batch. */
export const runPairs: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const { config } = json
  const checks: Check[] = []
  if (json.num_units_per_stage && config.mtl !== undefined) {
    const lengths = stageLengths({
      maxFrames: config.mtl,
      framesPerUnit: config.fpu,
      syncGroup: config.vsg,
      rank: config.rank,
      counter: config.acc + 1,
      batchUnits: unitsInClip(config.t, config.fpu),
      stageCount: config.ratios.length,
    })
    checks.push(exact('units per stage (exact)', lengths, json.num_units_per_stage))
  }
  const pairs = scope(() =>
    replayPairs(r, r.tensor('latents'), {
      ...config,
      framesPerUnit: config.fpu,
      corruptRatio: config.corrupt,
      unitsPerStage: json.num_units_per_stage,
    }),
  )
  checks.push(...(await pairChecks(r, pairs)))
  disposePairs(pairs)
  return checks
}

interface Conditioning {
  text: Tensor
  textMask: number[][]
  pooled: Tensor
}

function rowsOf(flat: readonly number[], rows: number): number[][] {
  const width = flat.length / rows
  return Array.from({ length: rows }, (_, i) => flat.slice(i * width, (i + 1) * width))
}

/** The recorded captions' features, with those of rows below the drop rate replaced by the null features. */
function conditioning(r: Recorded, rate: number): Conditioning {
  const rows = r.shape('prompt_embeds')[0] as number
  const masks = rowsOf(r.integers('prompt_attention_mask'), rows)
  const plain = { text: r.tensor('prompt_embeds'), textMask: masks, pooled: r.tensor('pooled_prompt_embeds') }
  if (!r.has('draw.drop_u')) return plain
  const dropped = Array.from(r.floats('draw.drop_u'), (u) => u <= rate)
  const choose = (all: Tensor, nothing: Tensor): Tensor => {
    const one = nothing.view([1, ...nothing.shape])
    return concat(
      dropped.map((drop, i) => (drop ? one : slice(all, 0, i, 1))),
      0,
    )
  }
  return {
    text: choose(plain.text, r.tensor('null.prompt_embed')),
    textMask: masks.map((mask, i) => (dropped[i] ? r.integers('null.prompt_attention_mask') : mask)),
    pooled: choose(plain.pooled, r.tensor('null.pooled_prompt_embed')),
  }
}

/** Mean over samples of the mean squared error, every sample weighing the same. */
function objective(predictions: readonly Tensor[], targets: readonly Tensor[]): Tensor {
  return mean(
    concat(
      predictions.map((v, c) => mse(v, targets[c] as Tensor)),
      0,
    ),
  )
}

/** The whole objective from raw latents and text features to the loss and every gradient. */
export const runTrainLoss: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const { config, normalisation: n } = json
  const model = await loadVelocityNetwork(r.sibling(json.model), {
    dtype: 'f32',
    train: true,
  })
  const image = { shift: n.image_shift, scale: n.image_scale }
  const video = { shift: n.video_shift ?? n.image_shift, scale: n.video_scale ?? n.image_scale }
  const made = scope(() => {
    const raw = r.tensor('raw_latents')
    const [b, c, h, w] = raw.shape as [number, number, number, number]
    const latents = normaliseLatents(raw.rank === 4 ? raw.view([b, c, 1, h, w]) : raw, { image, video })
    const pairs = replayPairs(r, latents, {
      ratios: config.sample_ratios,
      unitsPerStage: json.num_units_per_stage,
      framesPerUnit: config.frame_per_unit ?? 1,
      corruptRatio: config.corrupt_ratio,
    })
    const text = conditioning(r, config.cfg_rate ?? 0)
    const predictions = model.forward({ columns: pairs.columns, timesteps: pairs.timesteps, ...text })
    const loss = objective(predictions, pairs.targets)
    backward(loss)
    return { first: slice(latents, 0, 0, 1), pairs, text, predictions, loss }
  })
  clearTape()
  const checks = await pairChecks(r, made.pairs)
  if (r.has('normalised_latents_row0')) {
    checks.push(
      await compare('normalised latents', made.first, expected(r, 'normalised_latents_row0'), PAIRS),
    )
  }
  checks.push({
    name: 'dit.timesteps',
    error: relativeL2(made.pairs.timesteps, r.floats('dit.timesteps')),
    tolerance: PAIRS,
  })
  if (r.has('dit.prompt_embeds')) {
    checks.push(await compare('text after dropping', made.text.text, expected(r, 'dit.prompt_embeds'), 0))
    checks.push(await compare('pooled text', made.text.pooled, expected(r, 'dit.pooled_prompt_embeds'), 0))
    checks.push(
      exact('text mask (exact)', made.text.textMask.flat(), r.integers('dit.prompt_attention_mask')),
    )
  }
  for (const [c, prediction] of made.predictions.entries()) {
    checks.push(await compare(`prediction.${c}`, prediction, expected(r, `prediction.${c}`), PREDICTIONS))
  }
  checks.push(scalar('loss', await made.loss.item(), json.loss_value, LOSS))
  const record = {
    rows: json.gradient_table.rows,
    values: (name: string) => (r.has(`gsample.${name}`) ? r.floats(`gsample.${name}`) : undefined),
  }
  checks.push(...(await compareGradients((name) => model.parameters.get(name)?.grad, record, GRADIENTS)))
  disposePairs(made.pairs)
  for (const t of [made.first, made.text.text, made.text.pooled, ...made.predictions, made.loss]) t.dispose()
  for (const p of model.parameters.values()) p.grad?.dispose()
  model.dispose()
  return checks
}

/** AdamW steps on the inputs of another case: losses, gradient norms and the update of every parameter. */
export const runAdamW: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const { config } = json
  const folder = r.sibling((json.inputs_from as string).split(' ')[0] as string)
  const inputs = new Recorded(folder, readCase(folder))
  const modelDir = r.sibling(json.model)
  const model = await loadVelocityNetwork(modelDir, { dtype: 'f32', train: true })
  const optimizer = new AdamW(model.parameters, {
    betas: config.betas,
    eps: config.eps,
    weightDecay: config.weight_decay,
    maxGradNorm: config.clip_grad_norm ?? 0,
  })
  const batch = scope(() => fixedBatch(inputs))
  const loss = (): Tensor => objective(model.forward(batch), batch.targets)
  const losses: number[] = []
  const norms: number[] = []
  for (const learningRate of config.lr_per_step as number[]) {
    const step = scope(() => {
      const value = loss()
      backward(value)
      return { value, clip: optimizer.step(learningRate) }
    })
    losses.push(await step.value.item())
    norms.push((await step.clip.floats())[0] as number)
    step.value.dispose()
    step.clip.dispose()
  }
  clearTape()
  const final = noGrad(() => scope(loss))
  const checks: Check[] = [
    ...losses.map((v, i) => scalar(`loss of step ${i + 1}`, v, json.losses[i], ADAMW_LOSSES)),
    ...norms.map((v, i) =>
      scalar(`gradient norm of step ${i + 1}`, v, json.gradient_norms_before_clipping[i], 1e-3),
    ),
    scalar('final loss', await final.item(), json.final_loss, ADAMW_LOSSES),
    ...(await updateChecks(r, json.weight_table.rows, model.parameters, modelDir)),
  ]
  for (const t of [final, batch.text, batch.pooled, ...batch.columns.flat(), ...batch.targets]) t.dispose()
  optimizer.dispose()
  model.dispose()
  return checks
}

function fixedBatch(
  inputs: Recorded,
): Conditioning & { columns: Tensor[][]; targets: Tensor[]; timesteps: number[] } {
  const count = inputs.names.filter((name) => /^targets\.\d+$/.test(name)).length
  const columns = Array.from({ length: count }, (_, c) => {
    const clips = inputs.names.filter((name) => name.startsWith(`noisy.${c}.`)).length
    return Array.from({ length: clips }, (__, j) => inputs.tensor(`noisy.${c}.${j}`))
  })
  const rows = inputs.shape('dit.prompt_embeds')[0] as number
  return {
    columns,
    targets: columns.map((_, c) => inputs.tensor(`targets.${c}`)),
    timesteps: [...inputs.floats('dit.timesteps')],
    text: inputs.tensor('dit.prompt_embeds'),
    textMask: rowsOf(inputs.integers('dit.prompt_attention_mask'), rows),
    pooled: inputs.tensor('dit.pooled_prompt_embeds'),
  }
}

// Entries whose gradient is almost zero may move either way, so samples are compared as one vector over all parameters.
async function updateChecks(
  r: Recorded,
  rows: readonly (readonly [string, number, number])[],
  parameters: ReadonlyMap<string, Tensor>,
  modelDir: string,
): Promise<Check[]> {
  // Cases that go on beyond what the reference implementation recorded have losses alone.
  if (rows.length === 0) return []
  const initial = openWeights(modelDir)
  const mine: number[] = []
  const recorded: number[] = []
  let finalNorm: Check = { name: 'final norms', error: 0, tolerance: ADAMW_LOSSES }
  let updateNorm: Check = { name: 'update norms', error: 0, tolerance: ADAMW_UPDATES }
  for (const [name, norm, update] of rows) {
    const tensor = parameters.get(name)
    if (!tensor) return [{ name: `${name} is missing`, error: Number.POSITIVE_INFINITY, tolerance: 0 }]
    const now = await tensor.floats()
    const before = initial.readFloats(name)
    const samples = r.floats(`final_sample.${name}`)
    sampleIndices(now.length, samples.length).forEach((at, i) => {
      mine.push((now[at] as number) - (before[at] as number))
      recorded.push((samples[i] as number) - (before[at] as number))
    })
    const length = (values: Float32Array): number => Math.sqrt(values.reduce((sum, v) => sum + v * v, 0))
    const worse = (old: Check, next: Check): Check => (next.error <= old.error ? old : next)
    finalNorm = worse(finalNorm, scalar(`final norm of ${name}`, length(now), norm, ADAMW_LOSSES))
    const moved = length(now.map((v, i) => v - (before[i] as number)))
    updateNorm = worse(updateNorm, scalar(`update norm of ${name}`, moved, update, ADAMW_UPDATES))
  }
  return [
    { name: 'sampled updates', error: relativeL2(mine, recorded), tolerance: ADAMW_UPDATES },
    finalNorm,
    updateNorm,
  ]
}

/** Learning-rate tables, constant and cosine, with and without warm-up. */
export const runLearningRates: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  // The arguments are recorded as a sentence.
  const main = /lr ([\d.e-]+), min ([\d.e-]+), (\d+) epochs? x (\d+) iterations?, (\d+) warmup/.exec(
    json.arguments,
  )
  const bare = /no_warmup: lr ([\d.e-]+), (\d+) epochs? x (\d+)/.exec(json.arguments)
  if (!main || !bare)
    return [{ name: 'arguments are not understood', error: Number.POSITIVE_INFINITY, tolerance: 0 }]
  const [lr, min, epochs, iterations, warmupSteps] = main.slice(1).map(Number) as [
    number,
    number,
    number,
    number,
    number,
  ]
  const [bareRate, bareEpochs, bareIterations] = bare.slice(1).map(Number) as [number, number, number]
  const common = { learningRate: lr, minLearningRate: min, totalSteps: epochs * iterations, warmupSteps }
  const tables: Record<string, Float64Array> = {
    constant_with_warmup: learningRates({ ...common, kind: 'constant' }),
    cosine: learningRates({ ...common, kind: 'cosine' }),
    constant_no_warmup: learningRates({
      learningRate: bareRate,
      warmupSteps: 0,
      totalSteps: bareEpochs * bareIterations,
      kind: 'constant',
    }),
  }
  return r.names.map((name) => ({
    name: `${name} (absolute)`,
    error: maxAbsolute(tables[name] ?? [], r.doubles(name)),
    tolerance: 1e-12,
  }))
}
