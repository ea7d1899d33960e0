import { PyramidFluxTransformer } from '../../lib/models/dit-flux.ts'
import type { SampledNetwork } from '../../lib/sample/stage-run.ts'
import { asTrained } from '../../lib/train/samples.ts'
import type { Arm } from './arms.ts'
import { type Context, distanceOf, figure, type Line, pyramid, type Result, run, video } from './context.ts'
import { spatialPyramid, temporalPyramid } from './convergence.ts'
import { blockExcess, distance, fineEnergy, frameOf, type Spread, spreadOf } from './metrics.ts'
import { type Sampling, sample, scoresOf, unseenLatents } from './sampling.ts'
import { straightness } from './straightness.ts'
import { MODEL, prompts } from './world.ts'

const meanOf = (line: Line | undefined, key: string): number =>
  (line as Record<string, Spread> | undefined)?.[key]?.mean ?? Number.NaN

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
