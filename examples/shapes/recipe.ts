import { mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { CausalVideoVAE, Generator, PyramidFluxTransformer } from '../../lib/index.ts'
import { writeFileAtomically } from '../../lib/io/atomic.ts'
import {
  CachedTextEncoder,
  encodeLatents,
  encodeTexts,
  LatentDataset,
  openDataset,
  type TrainEvent,
  Trainer,
  VaeTrainer,
} from '../../lib/train/index.ts'
import { makeClips } from './make-clips.ts'
import { ditConfig, vaeConfig } from './networks.ts'
import { TEXT_SEED, writeTextEncoders } from './text-encoders.ts'
import { FPS, FRAMES, SIZE } from './world.ts'

// Makes the toy model from nothing: clips, VAE, latents, DiT, and the folder that the demo loads. Every part can be
// repeated alone (--only) and continues where it stopped.
const { values: args } = parseArgs({
  options: {
    out: { type: 'string', default: 'runs/shapes' },
    model: { type: 'string', default: 'examples/shapes/model' },
    clips: { type: 'string', default: '2400' },
    /** How many times as often as another shape a cross is drawn. */
    crosses: { type: 'string', default: '3' },
    'vae-steps': { type: 'string', default: '2500' },
    steps: { type: 'string', default: '30000' },
    batch: { type: 'string', default: '40' },
    dtype: { type: 'string', default: 'bf16' },
    /** Begin the transformer with the weights of this model folder. */
    from: { type: 'string' },
    'image-ratio': { type: 'string', default: '0.7' },
    'learning-rate': { type: 'string', default: '1e-3' },
    only: { type: 'string', default: 'clips,vae,encode,text,dit,export' },
    seed: { type: 'string', default: '1' },
  },
})

const seed = Number(args.seed)
const dtype = args.dtype === 'bf16' ? 'bf16' : 'f32'
const parts = args.only.split(',')
const clips = join(args.out, 'clips')
const latents = join(args.out, 'latents')
const texts = join(args.out, 'text')
const size = { width: SIZE, height: SIZE, frames: FRAMES, fps: FPS }

async function follow(label: string, events: AsyncIterable<TrainEvent>): Promise<void> {
  const window: { loss: number; seconds: number }[] = []
  for await (const event of events) {
    if (event.type === 'step') {
      window.push({ loss: event.loss, seconds: event.seconds })
      if (window.length > 50) window.shift()
      if (event.step % 50 === 0 || event.step <= 3) {
        const mean = (key: 'loss' | 'seconds'): number =>
          window.reduce((n, w) => n + w[key], 0) / window.length
        const { type, step, loss, seconds, learningRate, ...rest } = event
        console.error(
          `${label} ${step}: loss ${mean('loss').toFixed(5)} (${seconds.toFixed(2)} s, mean ${mean('seconds').toFixed(2)} s)`,
          Object.entries(rest)
            .map(([k, v]) => `${k} ${Number(v).toPrecision(4)}`)
            .join(' '),
        )
      }
    } else console.error(label, JSON.stringify(event))
  }
}

async function drawClips(): Promise<void> {
  await rm(clips, { recursive: true, force: true })
  const often = { cross: Number(args.crosses) }
  await makeClips({ out: clips, count: Number(args.clips), seed, split: 'train', often })
}

async function trainVae(): Promise<void> {
  const data = await openDataset(clips, { ...size, limit: 800, cacheBytes: 1.2e9 })
  const generator = new Generator(seed).stream('vae')
  const model = CausalVideoVAE.create(vaeConfig, {
    generator,
    dtype,
    train: true,
    initialLogvar: -5,
    resampler: true,
  })
  const trainer = new VaeTrainer({
    model,
    data,
    out: join(args.out, 'vae'),
    steps: Number(args['vae-steps']),
    batchSize: 8,
    seed,
    crops: [
      { size: 64, frames: 1, perClip: 3, until: 300 },
      { size: 40, frames: 17, from: 300 },
      { size: size.width, frames: 1, from: 300 },
      { size: 64, frames: 9, from: 300 },
    ],
    learningRate: 1e-3,
    minLearningRate: 5e-5,
    warmupSteps: 50,
    klWeight: 3e-6,
    optimizer: { emaDecay: 0.99 },
    checkpointEvery: 100,
  })
  await follow('vae', trainer.run({ resume: true }))
  await trainer.save(join(args.model, 'causal_video_vae'), 'bf16')
  trainer.dispose()
}

async function encode(): Promise<void> {
  const data = await openDataset(clips, size)
  const vae = await CausalVideoVAE.fromPretrained(join(args.model, 'causal_video_vae'), { dtype })
  await encodeLatents(vae, data, latents, {
    onProgress: (done, total) => {
      if (done % 100 === 0) console.error(`encode ${done}/${total}`)
    },
  })
  vae.dispose()
}

async function trainDit(): Promise<void> {
  const data = await LatentDataset.open(latents)
  const text = await CachedTextEncoder.open(texts)
  const generator = new Generator(seed).stream('dit')
  const how = { dtype, train: true } as const
  const model = args.from
    ? await PyramidFluxTransformer.fromPretrained(join(args.from, 'diffusion_transformer'), how)
    : PyramidFluxTransformer.create(ditConfig, { seed: Number(generator.streamId >> 12n), ...how })
  const trainer = new Trainer({
    model,
    data,
    text,
    out: join(args.out, 'dit'),
    steps: Number(args.steps),
    batchSize: Number(args.batch),
    // Outlines are drawn in the first frame and mostly at full size: most samples are spent there.
    sampleRatios: [1, 2, 2],
    imageRatio: Number(args['image-ratio']),
    posterior: 'mean',
    seed,
    learningRate: Number(args['learning-rate']),
    minLearningRate: 5e-5,
    warmupSteps: 100,
    schedule: 'cosine',
    optimizer: { emaDecay: 0.999, weightDecay: 1e-3 },
    checkpointEvery: 500,
  })
  await follow('dit', trainer.run({ resume: true }))
  await trainer.save(join(args.model, 'diffusion_transformer'), 'bf16')
  trainer.dispose()
  text.dispose()
}

/** The text encoders, and the features that they give for every caption. */
async function encodeCaptions(): Promise<void> {
  await writeTextEncoders(args.model, TEXT_SEED)
  const data = await LatentDataset.open(latents)
  await encodeTexts(args.model, data.captions, texts)
  data.dispose()
}

async function exportModel(): Promise<void> {
  const data = await LatentDataset.open(latents)
  const config = {
    normalisation: data.normalisation,
    sizes: [[128, 128]],
    fps: 24,
    seconds: 1,
    steps: [8, 8, 8],
    videoSteps: [6, 6, 6],
    guidanceScale: 3,
    videoGuidanceScale: 2.5,
    // The published models' praise and blame are not words of this world.
    promptSuffix: '',
    negativePrompt: '',
  }
  await writeFileAtomically(join(args.model, 'pyraflow.json'), `${JSON.stringify(config, null, 2)}\n`)
  data.dispose()
}

await main()

async function main(): Promise<void> {
  await mkdir(args.model, { recursive: true })
  const steps = {
    clips: drawClips,
    vae: trainVae,
    encode,
    text: encodeCaptions,
    dit: trainDit,
    export: exportModel,
  }
  for (const [name, step] of Object.entries(steps)) {
    if (!parts.includes(name)) continue
    const [began, cpu] = [performance.now(), process.cpuUsage()]
    await step()
    const { user, system } = process.cpuUsage(cpu)
    const seconds = (performance.now() - began) / 1000
    console.error(
      `${name}: ${seconds.toFixed(0)} s, ${((user + system) / 1e6).toFixed(0)} s of processor time`,
    )
  }
}
