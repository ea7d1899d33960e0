import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { engine } from '../lib/engine/engine.ts'
import { findWeights } from '../lib/io/find-weights.ts'
import { CausalVideoVAE } from '../lib/models/causal-vae.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { PastKeys } from '../lib/models/past-keys.ts'
import { miniFluxConfig } from '../lib/models/presets.ts'
import type { TransformerInputs } from '../lib/models/velocity-network.ts'
import { weightBytes } from '../lib/plan.ts'
import { planFolder } from '../lib/plan-folder.ts'
import { historyTokens, planHistory } from '../lib/pyramid/history.ts'
import type { Layout } from '../lib/pyramid/layout.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { scope } from '../lib/tensor/scope.ts'
import { noGrad } from '../lib/tensor/tape.ts'
import type { Tensor } from '../lib/tensor/tensor.ts'
import { peakRss } from './full-run.ts'
import { ceiling, type Effort, hasInt8, type Unnamed } from './harness.ts'

// A model folder of the published sizes, as `node dist/bench/make-full-size.js --out DIR` writes one.
const VARIABLE = 'PYRAFLOW_FULL_MODEL'
const [WIDTH, HEIGHT] = [640, 384]
const STAGES = 3
const UNITS = [0, 3, 15] as const

/**
 * The published network at full size: loading against reading, a denoising step of each stage with short and long
 * histories, and decoding a unit. `full-run.ts` makes a whole video and takes minutes to hours.
 */
export async function full(effort: Effort): Promise<Unnamed[]> {
  const dir = process.env[VARIABLE]
  if (dir === undefined || !existsSync(dir) || effort.quick) {
    const why = effort.quick ? 'a quick run' : `${VARIABLE} names no folder`
    process.stderr.write(`  full size is left out: ${why}\n`)
    return []
  }
  const whole = await transformer(dir)
  const rounded = hasInt8() ? await roundedSteps(dir, whole) : []
  return [...whole, ...rounded, ...(await decoder(dir)), ...(await memory(dir))]
}

/** Seconds that `cat` takes for the same bytes. */
function catSeconds(path: string): number {
  const begin = performance.now()
  spawnSync('sh', ['-c', 'cat "$1" > /dev/null', 'cat', path])
  return (performance.now() - begin) / 1000
}

async function transformer(dir: string): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  const folder = join(dir, 'diffusion_transformer_384p')
  const { path } = findWeights(folder)
  // Twice: the first reading may have to come from the disk.
  catSeconds(path)
  const cat = catSeconds(path)
  const load = async (): Promise<[PyramidFluxTransformer, number]> => {
    const begin = performance.now()
    const loaded = await PyramidFluxTransformer.fromPretrained(folder, { dtype: 'bf16', offload: 'possible' })
    return [loaded, (performance.now() - begin) / 1000]
  }
  // Memory that a virtual machine touches for the first time comes at a fraction of a GB/s: told apart by loading twice.
  const [first, cold] = await load()
  first.dispose()
  const [model, warm] = await load()
  rows.push(
    { name: 'load the transformer, f32 file to bf16, into new memory', value: cold, unit: 's' },
    {
      ...{ name: 'load it again, into memory used before', value: warm, unit: 's' },
      ...{ ratio: cat / warm, against: 'cat' },
    },
  )
  try {
    for (const unit of UNITS) {
      for (let stage = 0; stage < STAGES; stage++) rows.push(await step(model, unit, stage))
    }
    for (const unit of UNITS.slice(1)) {
      for (let stage = 0; stage < STAGES; stage++) rows.push(...(await keptSteps(model, unit, stage)))
    }
    rows.push(...(await offloaded(model)))
  } finally {
    model.dispose()
    await engine.idle()
  }
  return rows
}

/** The same steps with products in eight bits, against those in bf16. */
async function roundedSteps(dir: string, whole: readonly Unnamed[]): Promise<Unnamed[]> {
  const folder = join(dir, 'diffusion_transformer_384p')
  const begin = performance.now()
  const model = await PyramidFluxTransformer.fromPretrained(folder, { dtype: 'bf16', quantize: 'int8' })
  const rows: Unnamed[] = [
    { name: 'load the transformer, f32 file to int8', value: (performance.now() - begin) / 1000, unit: 's' },
  ]
  const bytes = weightBytes(model.parameters)
  rows.push({ name: 'weights of the transformer, int8', value: bytes / 2 ** 30, unit: 'GiB' })
  try {
    for (const unit of UNITS) {
      for (let stage = 0; stage < STAGES; stage++) {
        const row = await step(model, unit, stage)
        const ratio = (whole.find(({ name }) => name === row.name)?.value ?? Number.NaN) / row.value
        rows.push({ ...row, name: `${row.name}, products in int8`, ratio, against: 'the same in bf16' })
      }
    }
  } finally {
    model.dispose()
    await engine.idle()
  }
  return rows
}

/** Steps whose matrices are read from the file again, against the same in memory. */
async function offloaded(model: PyramidFluxTransformer): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  for (const unit of UNITS.slice(0, 2)) {
    const there = await step(model, unit, STAGES - 1)
    const stop = model.offload?.begin()
    const away = await step(model, unit, STAGES - 1)
    stop?.()
    await model.offload?.restore()
    const ratio = there.value / away.value
    rows.push({ ...away, name: `${away.name}, weights read again`, ratio, against: 'weights in memory' })
  }
  return rows
}

/** What a network call under guidance gets, with a random history. */
function callOf(
  model: PyramidFluxTransformer,
  unit: number,
  stage: number,
): TransformerInputs & { layout: Layout } {
  const generator = new Generator(unit)
  const [height, width] = [HEIGHT / 8, WIDTH / 8]
  const clip = (frames: number, level: number): Tensor => {
    const scale = 2 ** (STAGES - 1 - level)
    return generator.normal([2, 16, frames, height / scale, width / scale])
  }
  const clips = planHistory(unit, stage, STAGES).map(({ frameCount, level }) => clip(frameCount, level))
  const text = generator.normal([2, 128, miniFluxConfig.joint_attention_dim], { dtype: 'bf16' })
  const pooled = generator.normal([2, miniFluxConfig.pooled_projection_dim], { dtype: 'bf16' })
  const columns = [[...clips, clip(1, stage)]]
  const inputs = { columns, timesteps: [500, 500], text, pooled }
  return { ...inputs, layout: model.layout(inputs) }
}

function disposeCall({ columns, text, pooled }: TransformerInputs): void {
  for (const t of [text, pooled, ...columns.flat()]) t.dispose()
}

/** Seconds of one call. */
async function seconds(model: PyramidFluxTransformer, inputs: TransformerInputs): Promise<number> {
  const begin = ceiling('clock')
  noGrad(() => model.forward(inputs)[0] as Tensor).dispose()
  const [from, to] = await Promise.all([begin, ceiling('clock')])
  return to - from
}

function nameOf(unit: number, stage: number): string {
  const size = { height: HEIGHT / 8, width: WIDTH / 8 }
  const { total } = historyTokens({ unit, stage, stageCount: STAGES, ...size })
  return `step, unit ${unit}, stage ${stage}, 2 × ${total + 128} tokens, bf16`
}

async function step(model: PyramidFluxTransformer, unit: number, stage: number): Promise<Unnamed> {
  const inputs = callOf(model, unit, stage)
  try {
    // Once: a call is seconds long, and a warm-up would double them.
    return { name: nameOf(unit, stage), value: await seconds(model, inputs), unit: 's' }
  } finally {
    disposeCall(inputs)
  }
}

/** A step that keeps keys and values of text and history, and one that takes kept ones, against one without. */
async function keptSteps(model: PyramidFluxTransformer, unit: number, stage: number): Promise<Unnamed[]> {
  const inputs = callOf(model, unit, stage)
  const keys = new PastKeys(inputs.layout)
  try {
    await seconds(model, { ...inputs, keep: keys })
    const whole = await seconds(model, inputs)
    const keeping = await seconds(model, { ...inputs, keep: keys })
    const kept = await seconds(model, { ...inputs, past: keys })
    const row = (what: string, value: number): Unnamed => ({
      ...{ name: `${nameOf(unit, stage)}, ${what}`, value, unit: 's' },
      ...{ ratio: whole / value, against: 'the same without' },
    })
    return [row('keeping its history', keeping), row('history kept', kept)]
  } finally {
    keys.dispose()
    disposeCall(inputs)
  }
}

async function decoder(dir: string): Promise<Unnamed[]> {
  const vae = await CausalVideoVAE.fromPretrained(join(dir, 'causal_video_vae'), { dtype: 'bf16' })
  const generator = new Generator(1)
  const stream = vae.decodeStream()
  const rows: Unnamed[] = []
  try {
    for (const [name, frames] of [
      ['first frame', 1],
      ['frame of a later unit', 8],
    ] as const) {
      const z = generator.normal([1, 16, 1, HEIGHT / 8, WIDTH / 8], { dtype: 'bf16' })
      const begin = ceiling('clock')
      noGrad(() => scope(() => stream.push(z))).dispose()
      const [from, to] = await Promise.all([begin, ceiling('clock')])
      rows.push({ name: `decode, ${name}, ${WIDTH}×${HEIGHT}, bf16`, value: (to - from) / frames, unit: 's' })
      z.dispose()
    }
  } finally {
    stream.dispose()
    vae.dispose()
    await engine.idle()
  }
  return rows
}

/** What this process had at most, without text encoders, against the plan's largest phase. */
async function memory(dir: string): Promise<Unnamed[]> {
  const { bytes } = await planFolder(dir, { dtype: 'bf16', seconds: 5 })
  const value = peakRss() / 2 ** 30
  const planned = (bytes.weights.vae + bytes.decode) / 2 ** 30
  return [
    { name: 'peak RSS of this group', value, unit: 'GiB' },
    { name: 'plan: peak of a 5 s video', value: bytes.peak / 2 ** 30, unit: 'GiB' },
    { name: 'plan: VAE and decoding', value: planned, unit: 'GiB' },
  ]
}
