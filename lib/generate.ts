import { engine } from './engine/engine.ts'
import type { GenerateEvent, Video } from './generate/generation.ts'
import { decodeFrames, encodeImage } from './generate/latents.ts'
import type { Recipe } from './generate/options.ts'
import type { Pipeline } from './pipeline.ts'
import { type NoiseSource, type SampleEvent, sampleLatents, seededNoise } from './sample.ts'
import { Generator } from './tensor/generator.ts'
import type { Tensor } from './tensor/tensor.ts'
import { disposeFeatures, type TextFeatures } from './text/encoder.ts'

type UnitEvent = Extract<SampleEvent, { type: 'unit' }>

/** Prompt → frames, unit by unit: text features, the latents of each unit, and its frames as soon as it is done. */
export async function* generateVideo(
  pipeline: Pipeline,
  recipe: Recipe,
  signal: AbortSignal | undefined,
): AsyncGenerator<GenerateEvent, Video> {
  const generator = new Generator(recipe.seed).stream('generate')
  const owned: Tensor[] = []
  const { width, height, maxMemory } = recipe
  const stream = pipeline.vae.decodeStream({ maxMemory })
  const job = engine.newJob()
  const parts: Uint8Array[] = []
  let features: TextFeatures[] = []
  let count = 0
  const show = async (latent: Tensor): Promise<GenerateEvent> => {
    const frames = await decodeFrames(pipeline, latent, {
      begins: count === 0,
      decode: (z) => stream.pushSteps(z),
      signal,
      job,
    })
    parts.push(frames)
    const first = count
    count += frames.length / (width * height * 3)
    return { type: 'frames', first, frames, width, height, count: count - first }
  }
  try {
    const prompt = recipe.prompt + (pipeline.text.promptSuffix ?? '')
    features = await pipeline.encodePrompts([prompt, recipe.negativePrompt], { signal })
    const [text, negative] = features as [TextFeatures, TextFeatures]
    const first =
      recipe.image === undefined ? undefined : await encodeImage(pipeline, recipe.image, recipe, generator)
    if (first) {
      owned.push(first)
      yield await show(first)
    }
    const noise = seededNoise(generator)
    for await (const event of denoise(pipeline, { recipe, text, negative, noise, first, signal })) {
      if (event.type === 'progress') yield event
      else {
        owned.push(event.latent)
        yield await show(event.latent)
      }
    }
    const frames = new Uint8Array(count * width * height * 3)
    let at = 0
    for (const part of parts) {
      frames.set(part, at)
      at += part.length
    }
    return { frames, count, width, height, fps: recipe.fps, recipe }
  } finally {
    stream.dispose()
    features.forEach(disposeFeatures)
    for (const t of owned) t.dispose()
    await engine.idle().catch(() => undefined)
  }
}

async function* denoise(
  pipeline: Pipeline,
  job: {
    recipe: Recipe
    text: TextFeatures
    negative: TextFeatures
    noise: NoiseSource
    first: Tensor | undefined
    signal: AbortSignal | undefined
  },
): AsyncGenerator<Extract<GenerateEvent, { type: 'progress' }> | UnitEvent> {
  const { recipe, first } = job
  const factor = pipeline.vae.spatialFactor
  const began = performance.now()
  for await (const event of sampleLatents(pipeline.transformer, {
    stages: pipeline.stages,
    frames: (recipe.frames - 1) / pipeline.vae.temporalFactor + 1,
    height: recipe.height / factor,
    width: recipe.width / factor,
    text: job.text,
    negative: job.negative,
    steps: recipe.steps,
    videoSteps: recipe.videoSteps,
    guidance: { guidanceScale: recipe.guidanceScale, videoGuidanceScale: recipe.videoGuidanceScale },
    noise: job.noise,
    given: first,
    framesPerUnit: pipeline.config.framesPerUnit ?? 1,
    signal: job.signal,
  })) {
    if (event.type === 'unit') yield event
    else if (event.type === 'step') {
      const { unit, stage, done, total } = event
      const etaMs = ((performance.now() - began) / done) * (total - done)
      yield { type: 'progress', phase: 'denoise', unit, stage, done, total, etaMs }
    }
  }
}
