import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { ditConfig, vaeConfig } from '../examples/shapes/networks.ts'
import { engine } from '../lib/engine/engine.ts'
import { CausalVideoVAE } from '../lib/models/causal-vae.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { sampleLatents, seededNoise } from '../lib/sample.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { breakdown, type Effort, median, type Unnamed } from './harness.ts'
import { NORMALISATION, PROMPT, wordEncoder } from './toy.ts'

/** One toy generation: how long its phases take and which ops they consist of. */
export async function generate(effort: Effort): Promise<Unnamed[]> {
  const model = join('examples', 'shapes', 'model')
  const trained = existsSync(join(model, 'pyraflow.json'))
  const pipeline = trained ? await Pipeline.load(model, { dtype: 'bf16' }) : randomPipeline()
  const short = { frames: 9, steps: [1, 1, 1], videoSteps: [1, 1, 1] }
  const options = { prompt: PROMPT, seed: 1, ...(effort.quick && short) }
  try {
    // Kernels are built and weights paged in by a first, short run.
    await pipeline.generate({ ...options, ...short }).result()
    const rows: Unnamed[] = []
    engine.profile(true)
    const begin = performance.now()
    let denoised = begin
    let frames = 0
    for await (const event of pipeline.generate(options)) {
      if (event.type === 'frames') frames += event.count
      else if (event.type === 'progress' && event.done === event.total) {
        await engine.idle()
        denoised = performance.now()
        rows.push(...breakdown('denoise'))
        engine.profile(true)
      }
    }
    const end = performance.now()
    rows.push(...breakdown('decode'))
    engine.profile(false)
    const repeated = await repetition(pipeline, effort)
    const weights = trained ? 'examples/shapes/model' : 'random weights'
    const { width, height } = pipeline.resolve(options)
    const seconds = (ms: number): number => ms / 1000
    return [
      {
        name: `${frames} frames of ${width}×${height}, ${weights}, bf16`,
        value: seconds(end - begin),
        unit: 's',
      },
      { name: 'per frame', value: seconds(end - begin) / frames, unit: 's' },
      { name: 'denoise', value: seconds(denoised - begin), unit: 's' },
      { name: 'decode', value: seconds(end - denoised), unit: 's' },
      repeated,
      ...rows,
    ]
  } finally {
    engine.profile(false)
    pipeline.dispose()
    await engine.idle()
  }
}

/** Denoising whose steps are repeated (docs/decisions.md), against the same with every step queued anew. */
async function repetition(pipeline: Pipeline, effort: Effort): Promise<Unnamed> {
  const { transformer, stages, vae } = pipeline
  const { width, height, steps, videoSteps, guidanceScale, videoGuidanceScale } = pipeline.resolve({
    prompt: PROMPT,
  })
  const [text, negative] = [wordEncoder().encode([PROMPT]), wordEncoder().encode([''])]
  const options = {
    ...{ stages, text, negative, steps, videoSteps },
    ...{ frames: 3, height: height / vae.spatialFactor, width: width / vae.spatialFactor },
    guidance: { guidanceScale, videoGuidanceScale },
    noise: seededNoise(new Generator(1)),
  }
  const sample = async (repeat: boolean): Promise<number> => {
    const begin = performance.now()
    for await (const event of sampleLatents(transformer, { ...options, repeat })) {
      if (event.type === 'unit') event.latent.dispose()
    }
    await engine.idle()
    return performance.now() - begin
  }
  const [ours, ratios]: [number[], number[]] = [[], []]
  for (let i = 0; i < effort.rounds; i++) {
    const once = await sample(true)
    ours.push(once)
    ratios.push((await sample(false)) / once)
  }
  for (const { embeds, pooled } of [text, negative]) for (const x of [embeds, pooled]) x.dispose()
  return {
    name: 'denoise 9 frames, steps repeated',
    value: median(ours),
    unit: 'ms',
    ratio: median(ratios),
    against: 'the same with each step queued anew',
  }
}

function randomPipeline(): Pipeline {
  const generator = new Generator(1)
  return new Pipeline({
    transformer: PyramidFluxTransformer.create(ditConfig, { seed: 1, dtype: 'bf16' }),
    vae: CausalVideoVAE.create(vaeConfig, { generator: generator.stream('vae'), dtype: 'bf16' }),
    text: wordEncoder(),
    config: {
      normalisation: NORMALISATION,
      sizes: [[128, 128]],
      fps: 24,
      seconds: 1,
      steps: [8, 8, 8],
      videoSteps: [6, 6, 6],
      guidanceScale: 3,
      videoGuidanceScale: 2.5,
    },
    dtype: 'bf16',
  })
}
