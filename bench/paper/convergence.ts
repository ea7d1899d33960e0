import { makeStages } from '../../lib/flow/stages.ts'
import { asTrained } from '../../lib/train/samples.ts'
import type { Arm, Measured } from './arms.ts'
import {
  type Context,
  type Curve,
  distanceOf,
  figure,
  type Line,
  pyramid,
  type Result,
  run,
  video,
} from './context.ts'
import { spreadOf } from './metrics.ts'
import { type Sampling, scoresOf } from './sampling.ts'
import { prompts } from './world.ts'

// Rows that compare how fast two ways of training get somewhere: quality against FLOPs.

const flat = makeStages({ stageRange: [0, 1] })

/** What goes down as an arm learns, against the FLOPs of its training. */
type Loss = readonly [name: string, of: (point: Measured['points'][number]) => number]

const DISTANCE: Loss = ['distance', ({ distance }) => distance as number]
const WRONG: Loss = ['share without the colour that was asked for', ({ colour }) => 1 - (colour as number)]

const curve = (name: string, runs: readonly Measured[], [, of]: Loss): Curve => ({
  name,
  points: (runs[0] as Measured).points.map(({ flops }, i) => ({
    x: flops,
    y: spreadOf(runs.map(({ points: p }) => of(p[i] as Measured['points'][number]))),
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

/** How many times the FLOPs of the first curve the second one took to where it was at each of its points, in words. */
function slower(what: string, [own, base]: readonly Curve[]): string {
  const first = own?.points[0]?.y.mean ?? 0
  // Where the first curve began below, it may have been there long before it was measured.
  const ratios = (base?.points ?? [])
    .filter(({ y }) => y.mean < first)
    .map(({ x, y }) => x / reaches(own as Curve, y.mean))
    .sort((a, b) => a - b)
  if (ratios.length === 0)
    return `In ${what} the ${base?.name} nowhere comes to where the ${own?.name} began.`
  const [least, middle, most] = [0, ratios.length >> 1, ratios.length - 1].map((i) => ratios[i]?.toFixed(2))
  return `To the same ${what} the ${base?.name} took ${middle} times the FLOPs of the ${own?.name} (${least} to ${most}, ${ratios.length} points; 0 where the ${own?.name} never came).`
}

/** Row 1: the spatial pyramid against flow matching at full size, on still pictures, at equal latent tokens a batch. */
export async function spatialPyramid(context: Context): Promise<Result> {
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
  const charts = [WRONG, DISTANCE].map((loss) => ({ loss, arms: [] as Curve[] }))
  for (const [arm, how] of arms) {
    const runs = await run(context, arm, budget.steps, async (model) => ({
      distance: await distanceOf(context, model, how),
      ...(await scoresOf(world, model, asked, how, 6)),
    }))
    for (const { loss, arms: curves } of charts) curves.push(curve(arm.name, runs, loss))
    const half = Math.ceil(budget.points / 2) - 1
    lines.push({
      arm: arm.name,
      'colour right at half the steps': figure(runs, 'colour', half),
      'at the end': figure(runs, 'colour'),
      'shape right': figure(runs, 'shape'),
      'distance at half the steps': figure(runs, 'distance', half),
      distance: figure(runs, 'distance'),
      'TFLOP of training': ((runs[0] as Measured).points.at(-1)?.flops ?? 0) / 1e12,
    })
  }
  const found = charts.map(({ loss, arms: curves }) => slower(loss[0], curves))
  return {
    row: 1,
    claim: 'The spatial pyramid converges about 3 times faster than flow matching at full size.',
    measured: `Pictures of 24 steps against the FLOPs of training, at equal latent tokens a batch: of ${budget.scored} the share in which the scorer reads the colour as asked for, and the sliced Wasserstein distance of ${budget.samples} to unseen ones (the seeds of samples are fixed).`,
    lines,
    charts: charts.map(({ loss, arms: curves }) => ({ x: 'FLOP of training', y: loss[0], arms: curves })),
    verdict: `${found.join(' ')} The paper: about 3; aim: at least 2.`,
  }
}

/** Row 2: autoregressive with the temporal pyramid against whole clips at once, at equal FLOPs. */
export async function temporalPyramid(context: Context): Promise<Result> {
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
  const charts = [WRONG, DISTANCE].map((loss) => ({ loss, arms: [] as Curve[] }))
  for (const [arm, how] of arms) {
    const runs = await run(context, arm, budget.steps, async (model) => {
      const network = asTrained(model, arm.causal)
      const read = await scoresOf(world, network, asked, how, 6)
      return { distance: await distanceOf(context, network, how), ...read }
    })
    for (const { loss, arms: curves } of charts) curves.push(curve(arm.name, runs, loss))
    lines.push({
      arm: arm.name,
      'colour right': figure(runs, 'colour'),
      'shape right': figure(runs, 'shape'),
      'motion right': figure(runs, 'motion'),
      distance: figure(runs, 'distance'),
      'GFLOP a step': ((runs[0] as Measured).points.at(-1)?.flops ?? 0) / budget.steps / 1e9,
    })
  }
  const found = charts.map(({ loss, arms: curves }) => atEqual(loss[0], curves))
  return {
    row: 2,
    claim: 'The autoregressive temporal pyramid converges much faster than full-sequence diffusion.',
    measured: `Videos of 6 steps a stage against the FLOPs of training: of ${budget.scored} the share in which the scorer reads the colour as asked for, and the sliced Wasserstein distance of ${budget.samples} to unseen ones.`,
    lines,
    charts: charts.map(({ loss, arms: curves }) => ({ x: 'FLOP of training', y: loss[0], arms: curves })),
    verdict: `${found.join(' ')} Clips have four latent frames, of which the temporal pyramid saves little.`,
  }
}

/** Both curves where the shorter one ends, in words. */
function atEqual(what: string, curves: readonly Curve[]): string {
  const [own, base] = curves as [Curve, Curve]
  const most = Math.min(own.points.at(-1)?.x ?? 0, base.points.at(-1)?.x ?? 0)
  const [a, b] = [valueAt(own, most), valueAt(base, most)]
  return `At ${(most / 1e12).toFixed(1)} TFLOP the ${what} is ${a.toFixed(3)} ${own.name} and ${b.toFixed(3)} ${base.name}: ${differ(a, b, own, base)}.`
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
