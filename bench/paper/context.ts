import { makeStages } from '../../lib/flow/stages.ts'
import type { PyramidFluxTransformer } from '../../lib/models/dit-flux.ts'
import type { SampledNetwork } from '../../lib/sample/stage-run.ts'
import { type Arm, type Measured, trainArm } from './arms.ts'
import { distance, frameOf, type Spread, spreadOf } from './metrics.ts'
import { type Sampling, sample, unseenLatents } from './sampling.ts'
import type { World } from './world.ts'

/** How much is spent on a row. */
export interface Budget {
  readonly seeds: readonly number[]
  /** Steps of arms that begin with nothing, and of arms that begin with the toy model. */
  readonly steps: number
  readonly tunedSteps: number
  /** Measurements in a run of an arm that begins with nothing. */
  readonly points: number
  /** Pictures or videos that distances are taken over, and videos that are scored. */
  readonly samples: number
  readonly scored: number
}

export interface Context {
  readonly world: World
  readonly budget: Budget
  readonly dir: string
  readonly say: (line: string) => void
}

/** Figures of one arm: mean and standard deviation over seeds. */
export type Line = { readonly arm: string } & { readonly [figure: string]: Spread | string | number }

export interface Curve {
  readonly name: string
  readonly points: readonly { readonly x: number; readonly y: Spread }[]
}

export interface Result {
  readonly row: number
  readonly claim: string
  readonly measured: string
  readonly lines: readonly Line[]
  readonly charts?: readonly { readonly x: string; readonly y: string; readonly arms: readonly Curve[] }[]
  readonly verdict: string
}

/** The stages of the published models. */
export const pyramid = makeStages()

/** Several points of a run, the last at its end; of runs that begin with a trained model only the end says anything. */
const pointsOf = ({ tuned }: Arm, steps: number, points: number): number[] =>
  tuned ? [steps] : Array.from({ length: points }, (_, i) => Math.round(((i + 1) * steps) / points))

/** Distance of what a model makes to what it never saw, over the captions of that. */
export async function distanceOf(
  { world, budget }: Context,
  model: SampledNetwork,
  how: Sampling,
): Promise<number> {
  const real = unseenLatents(world, budget.samples)
  const made = await sample(world, model, real.captions, how, 5)
  try {
    const upTo = how.frames
    return upTo === real.latents.shape[2]
      ? await distance(made, real.latents)
      : await distance(made, frameOf(real.latents, 0))
  } finally {
    made.dispose()
    real.latents.dispose()
  }
}

/** Trains an arm with every seed and measures it on the way. */
export async function run(
  context: Context,
  arm: Arm,
  steps: number,
  measure: (model: PyramidFluxTransformer) => Promise<Record<string, number>>,
): Promise<Measured[]> {
  const { world, budget, dir, say } = context
  const all: Measured[] = []
  for (const seed of budget.seeds) {
    all.push(await trainArm(world, arm, { dir, seed, at: pointsOf(arm, steps, budget.points), say }, measure))
  }
  return all
}

/** A figure of an arm over its seeds, at the end or at another of its points. */
export const figure = (runs: readonly Measured[], name: string, at = -1): Spread =>
  spreadOf(runs.map(({ points: p }) => p.at(at)?.[name] as number))

/** How videos are sampled. */
export const video = {
  steps: [6, 6, 6],
  frames: 4,
} as const
