import { existsSync } from 'node:fs'
import { readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { writeFileAtomically } from '../../lib/io/atomic.ts'
import { PyramidFluxTransformer } from '../../lib/models/dit-flux.ts'
import { type ObjectiveOptions, Trainer } from '../../lib/train/index.ts'
import { MODEL, type World } from './world.ts'

/** One way to train, everything else being equal. */
export interface Arm
  extends Pick<
    ObjectiveOptions,
    | 'stages'
    | 'sampleRatios'
    | 'temporalPyramid'
    | 'coupledNoise'
    | 'corruptRatio'
    | 'imageRatio'
    | 'batchSize'
  > {
  readonly name: string
  readonly batchSize: number
  /** Whether frames see no later ones, true. */
  readonly causal?: boolean
  /** Begin with the toy model instead of from nothing. */
  readonly tuned?: boolean
  readonly learningRate?: number
}

/** What was measured after `step` steps. */
export interface Point {
  readonly step: number
  /** Multiplications and additions of training so far. */
  readonly flops: number
  readonly [metric: string]: number
}

// Wide enough to learn the world's colours and outlines in minutes.
const NETWORK = {
  num_layers: 2,
  num_single_layers: 2,
  attention_head_dim: 32,
  num_attention_heads: 4,
  joint_attention_dim: 64,
  pooled_projection_dim: 64,
  axes_dims_rope: [8, 12, 12] as [number, number, number],
}

export interface Measured {
  readonly points: readonly Point[]
  readonly seconds: number
}

/**
 * Trains an arm and measures it at some steps, with the moving average of its weights; what was measured before in `dir`
 * under the same name is read back.
 */
export async function trainArm(
  world: World,
  arm: Arm,
  o: { dir: string; seed: number; at: readonly number[]; say: (line: string) => void },
  measure: (model: PyramidFluxTransformer) => Promise<Record<string, number>>,
): Promise<Measured> {
  const { name, causal = true, tuned = false, learningRate = 1e-3, ...objective } = arm
  const steps = Math.max(...o.at)
  const path = join(o.dir, `${name}-${steps}-${o.seed}.json`)
  if (existsSync(path)) return JSON.parse(await readFile(path, 'utf8')) as Measured
  const out = join(o.dir, `${name}-${o.seed}.run`)
  await rm(out, { recursive: true, force: true })
  const how = { dtype: 'bf16', train: true } as const
  const model = tuned
    ? await PyramidFluxTransformer.fromPretrained(join(MODEL, 'diffusion_transformer'), how)
    : PyramidFluxTransformer.create(
        { ...NETWORK, use_temporal_causal: causal },
        { seed: 100 + o.seed, ...how },
      )
  const trainer = new Trainer({
    ...{ model, data: world.train, text: world.text, out, steps, seed: o.seed, learningRate, causal },
    ...{ minLearningRate: learningRate / 20, warmupSteps: Math.min(50, steps), schedule: 'cosine' },
    ...{ posterior: 'mean', optimizer: { emaDecay: 0.99 }, ...objective },
  })
  const points: Point[] = []
  let seconds = 0
  try {
    const { flops } = await trainer.plan()
    let losses: number[] = []
    for await (const event of trainer.run()) {
      if (event.type !== 'step') continue
      losses.push(event.loss)
      seconds += event.seconds
      if (!o.at.includes(event.step)) continue
      const loss = losses.reduce((a, b) => a + b, 0) / losses.length
      losses = []
      const found = await trainer.optimizer.withEma(() => measure(model))
      points.push({ step: event.step, flops: event.step * flops.mean, loss, ...found })
      o.say(`${name}, seed ${o.seed}: ${JSON.stringify(points.at(-1))}`)
    }
  } finally {
    trainer.dispose()
    model.dispose()
    await rm(out, { recursive: true, force: true })
  }
  const result = { points, seconds }
  await writeFileAtomically(path, `${JSON.stringify(result)}\n`)
  return result
}
