import { makeStages } from '../../lib/flow/stages.ts'
import { PyramidFluxTransformer } from '../../lib/models/dit-flux.ts'
import type { SampledNetwork } from '../../lib/sample/stage-run.ts'
import { asTrained } from '../../lib/train/samples.ts'
import { type Arm, type Measured, trainArm } from './arms.ts'
import { blockExcess, distance, fineEnergy, frameOf, type Spread, spreadOf } from './metrics.ts'
import { type Sampling, sample, scoresOf, unseenLatents } from './sampling.ts'
import { straightness } from './straightness.ts'
import { MODEL, prompts, type World } from './world.ts'

/** How much is spent on a row. */
export interface Budget {
  readonly seeds: readonly number[]
  /** Steps of arms that begin with nothing, and of arms that begin with the toy model. */
  readonly steps: number
  readonly tunedSteps: number
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
  readonly curves?: { readonly x: string; readonly y: string; readonly arms: readonly Curve[] }
  readonly verdict: string
}

const pyramid = makeStages()
const flat = makeStages({ stageRange: [0, 1] })

/** Several points of a run, the last at its end; of runs that begin with a trained model only the end says anything. */
const pointsOf = ({ tuned }: Arm, steps: number): number[] =>
  tuned ? [steps] : [0.25, 0.5, 0.75, 1].map((share) => Math.round(share * steps))

async function distanceOf({ world, budget }: Context, model: SampledNetwork, how: Sampling): Promise<number> {
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

async function run(
  context: Context,
  arm: Arm,
  steps: number,
  measure: (model: PyramidFluxTransformer) => Promise<Record<string, number>>,
): Promise<Measured[]> {
  const { world, budget, dir, say } = context
  const all: Measured[] = []
  for (const seed of budget.seeds) {
    all.push(await trainArm(world, arm, { dir, seed, at: pointsOf(arm, steps), say }, measure))
  }
  return all
}

const meanOf = (line: Line | undefined, key: string): number =>
  (line as Record<string, Spread> | undefined)?.[key]?.mean ?? Number.NaN

const figure = (runs: readonly Measured[], name: string, at = -1): Spread =>
  spreadOf(runs.map(({ points: p }) => p.at(at)?.[name] as number))

const curve = (name: string, runs: readonly Measured[], x: string, y: string): Curve => ({
  name,
  points: (runs[0] as Measured).points.map((point, i) => ({
    x: point[x] as number,
    y: figure(runs, y, i),
  })),
})

/** FLOPs at which a curve first comes down to `target`, between its points; infinite when it does not. */
function reaches({ points: p }: Curve, target: number): number {
  for (const [i, { x, y }] of p.entries()) {
    if (y.mean > target) continue
    const before = p[i - 1]
    if (!before) return x
    return before.x + ((x - before.x) * (before.y.mean - target)) / (before.y.mean - y.mean)
  }
  return Number.POSITIVE_INFINITY
}

const times = (ratio: number): string =>
  Number.isFinite(ratio) ? `${ratio.toFixed(2)} ×` : 'more than was spent'

/** Row 1: the spatial pyramid against flow matching at full size, on still pictures, at equal latent tokens a batch. */
async function spatialPyramid(context: Context): Promise<Result> {
  const { world, budget } = context
  const asked = prompts(budget.scored)
  // A set of four samples at the three sizes has 4 + 2·16 + 64 = 100 tokens, a picture at full size 64.
  const arms: [Arm, Sampling][] = [
    [
      { name: 'pyramid', stages: pyramid, sampleRatios: [1, 2, 1], batchSize: 64, imageRatio: 1 },
      { stages: pyramid, steps: [8, 8, 8], frames: 1 },
    ],
    [
      { name: 'full-size', stages: flat, sampleRatios: [1], batchSize: 25, imageRatio: 1 },
      { stages: flat, steps: [24], frames: 1 },
    ],
  ]
  const lines: Line[] = []
  const curves: Curve[] = []
  for (const [arm, how] of arms) {
    const runs = await run(context, arm, budget.steps, async (model) => ({
      distance: await distanceOf(context, model, how),
      ...(await scoresOf(world, model, asked, how, 6)),
    }))
    curves.push(curve(arm.name, runs, 'flops', 'distance'))
    lines.push({
      arm: arm.name,
      'distance at half the steps': figure(runs, 'distance', 1),
      distance: figure(runs, 'distance'),
      colour: figure(runs, 'colour'),
      shape: figure(runs, 'shape'),
      'TFLOP of training': ((runs[0] as Measured).points.at(-1)?.flops ?? 0) / 1e12,
      'seconds of training': spreadOf(runs.map(({ seconds }) => seconds)),
    })
  }
  const [own, base] = curves as [Curve, Curve]
  const last = base.points.at(-1) as Curve['points'][number]
  const ratio = last.x / reaches(own, last.y.mean)
  return {
    row: 1,
    claim: 'The spatial pyramid converges about 3 times faster than flow matching at full size.',
    measured: `Sliced Wasserstein distance of 24-step pictures to unseen ones (the seed of a sample is fixed) against the FLOPs of training, at equal latent tokens a batch; colour and shape as the scorer reads them from ${budget.scored} pictures.`,
    lines,
    curves: { x: 'FLOP of training', y: 'distance', arms: curves },
    verdict:
      Number.isFinite(ratio) && ratio > 0
        ? `The pyramid reaches the final distance of the baseline with ${times(ratio)} fewer FLOPs (the paper: about 3; aim: at least 2).`
        : `Not reproduced: within ${(last.x / 1e12).toFixed(1)} TFLOP the pyramid does not reach the final distance of the baseline, ${last.y.mean.toFixed(3)}.`,
  }
}

const video = {
  steps: [6, 6, 6],
  frames: 4,
} as const

/** Row 2: autoregressive with the temporal pyramid against whole clips at once, at equal FLOPs. */
async function temporalPyramid(context: Context): Promise<Result> {
  const { world, budget } = context
  const asked = prompts(budget.scored)
  const arms: [Arm, Sampling][] = [
    [
      { name: 'autoregressive', stages: pyramid, sampleRatios: [1, 2, 1], batchSize: 32 },
      { stages: pyramid, ...video },
    ],
    [
      {
        ...{ name: 'full-sequence', stages: pyramid, sampleRatios: [1, 2, 1], batchSize: 16 },
        ...{ temporalPyramid: false, causal: false },
      },
      { stages: pyramid, ...video, fullSequence: true },
    ],
  ]
  const lines: Line[] = []
  const curves: Curve[] = []
  for (const [arm, how] of arms) {
    const runs = await run(context, arm, budget.steps, async (model) => {
      const network = asTrained(model, arm.causal)
      const read = await scoresOf(world, network, asked, how, 6)
      return { distance: await distanceOf(context, network, how), ...read }
    })
    curves.push(curve(arm.name, runs, 'flops', 'distance'))
    lines.push({
      arm: arm.name,
      distance: figure(runs, 'distance'),
      colour: figure(runs, 'colour'),
      motion: figure(runs, 'motion'),
      'GFLOP a step': ((runs[0] as Measured).points.at(-1)?.flops ?? 0) / budget.steps / 1e9,
      'seconds of training': spreadOf(runs.map(({ seconds }) => seconds)),
    })
  }
  const [own, base] = curves as [Curve, Curve]
  const most = Math.min(own.points.at(-1)?.x ?? 0, base.points.at(-1)?.x ?? 0)
  const [a, b] = [valueAt(own, most), valueAt(base, most)]
  return {
    row: 2,
    claim: 'The autoregressive temporal pyramid converges much faster than full-sequence diffusion.',
    measured: `Sliced Wasserstein distance of videos to unseen ones against the FLOPs of training; colour and motion as the scorer reads them from ${budget.scored} videos.`,
    lines,
    curves: { x: 'FLOP of training', y: 'distance', arms: curves },
    verdict: `At ${(most / 1e12).toFixed(1)} TFLOP the distance is ${a.toFixed(3)} autoregressive and ${b.toFixed(3)} full-sequence: ${differ(a, b, own, base)}. Clips have four latent frames, of which the temporal pyramid saves little.`,
  }
}

function differ(a: number, b: number, ...curves: readonly Curve[]): string {
  const spread = curves.reduce((n, { points: p }) => n + (p.at(-1)?.y.std ?? 0), 0)
  if (Math.abs(a - b) <= spread) return 'no difference beyond the spread of seeds'
  return a < b ? 'reproduced' : 'not reproduced, the other way round'
}

function valueAt({ points: p }: Curve, x: number): number {
  const next = p.findIndex((point) => point.x >= x)
  const [a, b] = [p[Math.max(0, next - 1)], p[next < 0 ? p.length - 1 : next]] as [
    Curve['points'][number],
    Curve['points'][number],
  ]
  if (a === b || b.x === a.x) return b.y.mean
  return a.y.mean + ((b.y.mean - a.y.mean) * (x - a.x)) / (b.x - a.x)
}

/** Row 3: what enters a stage, on the trained toy model; nothing is trained. */
async function renoising(context: Context): Promise<Result> {
  const { world, budget, say } = context
  const model = await PyramidFluxTransformer.fromPretrained(`${MODEL}/diffusion_transformer`, {
    dtype: 'bf16',
  })
  const variants: [string, Sampling['jump']][] = [
    ['corrective, γ = 1/3', undefined],
    ...[0.2, 0.1].map((gamma): [string, Sampling['jump']] => [
      `noise of γ = ${gamma}`,
      (own) => ({ ...own, gamma }),
    ]),
    ['white noise of equal variance', (own) => ({ ...own, gamma: 0 })],
    ['no noise, no rescaling', () => ({ alpha: 1, beta: 0, gamma: 0 })],
  ]
  const asked = prompts(budget.scored)
  const real = unseenLatents(world, budget.samples)
  const lines: Line[] = []
  try {
    const [energy, excess] = [await fineEnergy(real.latents), await blockExcess(real.latents)]
    for (const [name, jump] of variants) {
      const figures: Record<string, number[]> = {
        distance: [],
        excess: [],
        energy: [],
        shape: [],
        colour: [],
      }
      for (const seed of budget.seeds) {
        const how = { stages: pyramid, ...video, guidance: 2.5, ...(jump && { jump }) }
        const made = await sample(world, model, real.captions, how, seed)
        figures.distance?.push(await distance(made, real.latents))
        figures.excess?.push((await blockExcess(made)) - excess)
        figures.energy?.push((await fineEnergy(made)) / energy)
        made.dispose()
        const read = await scoresOf(world, model, asked, how, seed + 50)
        figures.shape?.push(read.shape)
        figures.colour?.push(read.colour)
      }
      const of = (key: string): Spread => spreadOf(figures[key] as number[])
      lines.push({
        arm: name,
        distance: of('distance'),
        'excess correlation inside 2×2 blocks': of('excess'),
        'energy of the finest details (1 = real)': of('energy'),
        colour: of('colour'),
        shape: of('shape'),
      })
      say(`${name}: ${JSON.stringify(lines.at(-1))}`)
    }
  } finally {
    real.latents.dispose()
    model.dispose()
  }
  const mean = (i: number, key: string): number => meanOf(lines.at(i), key)
  const blocks = 'excess correlation inside 2×2 blocks'
  const best = lines.reduce((a, b) => ((a.distance as Spread).mean <= (b.distance as Spread).mean ? a : b))
  return {
    row: 3,
    claim: 'Corrective renoising is needed at jumps; without it pictures are blurry and blocky.',
    measured: `The committed toy model with other noise at the jumps; ${budget.samples} videos for distances and block measures, ${budget.scored} scored; spread over ${budget.seeds.length} seeds of the noise.`,
    lines,
    verdict: `Excess block correlation is ${mean(0, blocks).toFixed(4)} with corrective renoising, ${mean(-2, blocks).toFixed(4)} with white noise and ${mean(-1, blocks).toFixed(4)} without noise; the distance is ${mean(0, 'distance').toFixed(3)}, ${mean(-2, 'distance').toFixed(3)} and ${mean(-1, 'distance').toFixed(3)}. The least distance has: ${best.arm}.`,
  }
}

/** Row 4: one noise for both ends of a stage, or one each, on still pictures. */
async function coupling(context: Context): Promise<Result> {
  const { world, budget } = context
  const stills = { stages: pyramid, sampleRatios: [1, 2, 1], batchSize: 64, imageRatio: 1 }
  const lines: Line[] = []
  for (const arm of [
    { name: 'pyramid', ...stills },
    { name: 'independent', ...stills, coupledNoise: false },
  ]) {
    const runs = await run(context, { ...arm, name: `${arm.name}-straight` }, budget.steps, async (model) => {
      const few = { stages: pyramid, steps: [2, 2, 2], frames: 1 }
      const many = { stages: pyramid, steps: [8, 8, 8], frames: 1 }
      return {
        bend: await straightness(world, model, budget.samples / 2, pyramid),
        few: await distanceOf(context, model, few),
        many: await distanceOf(context, model, many),
      }
    })
    lines.push({
      arm: arm.name === 'pyramid' ? 'coupled' : 'independent',
      'training loss': figure(runs, 'loss'),
      'bend of trajectories': figure(runs, 'bend'),
      'distance, 2 steps a stage': figure(runs, 'few'),
      'distance, 8 steps a stage': figure(runs, 'many'),
    })
  }
  const mean = (i: number, key: string): number => meanOf(lines[i], key)
  const lower = (key: string): boolean => mean(0, key) < mean(1, key)
  const keys = Object.keys(lines[0] ?? {}).filter((key) => key !== 'arm')
  return {
    row: 4,
    claim: 'One noise for the start and the end of a stage straightens the flow.',
    measured:
      'Arms trained with coupled and with independent noise: the loss at the end, how far velocities along a sampled stage are from its chord (mean square, relative to the chord), and distances with few and many steps.',
    lines,
    verdict: `Lower with coupled noise: ${keys.filter(lower).join(', ') || 'nothing'}; not lower: ${keys.filter((key) => !lower(key)).join(', ') || 'nothing'}.`,
  }
}

/** Distance of every latent frame of generated videos. */
async function byFrame({ world, budget }: Context, model: SampledNetwork): Promise<Record<string, number>> {
  const real = unseenLatents(world, budget.samples)
  const made = await sample(world, model, real.captions, { stages: pyramid, ...video }, 7)
  const found: Record<string, number> = {}
  for (let t = 0; t < video.frames; t++) {
    const [a, b] = [frameOf(made, t), frameOf(real.latents, t)]
    found[`frame${t}`] = await distance(a, b)
    a.dispose()
    b.dispose()
  }
  made.dispose()
  real.latents.dispose()
  return found
}

async function tunedArms(
  context: Context,
  arms: readonly (Omit<Arm, 'stages' | 'sampleRatios' | 'batchSize'> & { name: string })[],
): Promise<Line[]> {
  const { world, budget } = context
  const asked = prompts(budget.scored)
  const lines: Line[] = []
  for (const own of arms) {
    const arm: Arm = {
      ...{ stages: pyramid, sampleRatios: [1, 2, 2], batchSize: 20, tuned: true, learningRate: 3e-4 },
      ...own,
    }
    const runs = await run(context, arm, budget.tunedSteps, async (model) => {
      const network = asTrained(model, arm.causal)
      const how = { stages: pyramid, ...video }
      const read = await scoresOf(world, network, asked, how, 8)
      const frames = await byFrame(context, network)
      return { ...frames, drift: (frames.frame3 as number) - (frames.frame1 as number), ...read }
    })
    lines.push({
      arm: arm.name,
      'distance of frame 0': figure(runs, 'frame0'),
      'frame 1': figure(runs, 'frame1'),
      'frame 3': figure(runs, 'frame3'),
      'drift (frame 3 − 1)': figure(runs, 'drift'),
      colour: figure(runs, 'colour'),
      shape: figure(runs, 'shape'),
      motion: figure(runs, 'motion'),
    })
  }
  return lines
}

const drift = (line: Line | undefined): Spread => line?.['drift (frame 3 − 1)'] as Spread

/** Row 5: frames that see no later ones, or all, in autoregressive training. */
async function causality(context: Context): Promise<Result> {
  const lines = await tunedArms(context, [{ name: 'causal' }, { name: 'bidirectional', causal: false }])
  const [a, b] = [drift(lines[0]), drift(lines[1])]
  return {
    row: 5,
    claim: 'Frame-causal attention beats bidirectional attention in autoregressive generation.',
    measured:
      'The toy model trained on with either mask; distance of latent frames 0, 1 and 3 of generated videos, and their scores.',
    lines,
    verdict: `Drift ${a.mean.toFixed(3)} ± ${a.std.toFixed(3)} causal, ${b.mean.toFixed(3)} ± ${b.std.toFixed(3)} bidirectional: ${a.mean + a.std < b.mean - b.std ? 'reproduced' : 'no difference beyond the spread of seeds'}.`,
  }
}

/** Row 6: how much noise the history gets in training. */
async function corruption(context: Context): Promise<Result> {
  const lines = await tunedArms(context, [
    { name: 'corruption-0', corruptRatio: 0 },
    { name: 'corruption-1-6', corruptRatio: 1 / 6 },
    { name: 'causal', corruptRatio: 1 / 3 },
    { name: 'corruption-1-2', corruptRatio: 1 / 2 },
  ])
  const drifts = lines.map(drift)
  const [none, own] = [drifts[0] as Spread, drifts[2] as Spread]
  return {
    row: 6,
    claim: 'History corruption U[0, 1/3] limits the accumulation of errors.',
    measured:
      'The toy model trained on with other upper ends of the noise level of history (1/3 is row 5’s causal arm).',
    lines: lines.map((line, i) => ({ ...line, arm: ['0', '1/6', '1/3', '1/2'][i] as string })),
    verdict: `Drift without corruption ${none.mean.toFixed(3)} ± ${none.std.toFixed(3)}, with 1/3 ${own.mean.toFixed(3)} ± ${own.std.toFixed(3)}: ${own.mean + own.std < none.mean - none.std ? 'reproduced' : 'no difference beyond the spread of seeds'}.`,
  }
}

export const ROWS: Readonly<Record<string, (context: Context) => Promise<Result>>> = {
  1: spatialPyramid,
  2: temporalPyramid,
  3: renoising,
  4: coupling,
  5: causality,
  6: corruption,
}
