import { cpSync } from 'node:fs'
import { mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { CausalVideoVAE, Pipeline } from '../../lib/index.ts'
import { writeFileAtomically } from '../../lib/io/atomic.ts'
import { contactSheet } from '../../lib/io/contact-sheet.ts'
import { encodeMp4 } from '../../lib/io/video.ts'
import {
  CachedTextEncoder,
  encodeLatents,
  encodeTexts,
  FineTune,
  LatentDataset,
  type LatentSource,
  openDataset,
  Trainer,
} from '../../lib/train/index.ts'
import { scoreClip } from './scorer.ts'
import {
  BACKGROUND_NAMES,
  COLOURS,
  caption,
  FPS,
  FRAMES,
  MOTIONS,
  makeRng,
  type Palette,
  type Rgb,
  randomSpec,
  renderClip,
  SIZE,
} from './world.ts'

// Teaches the toy model a colour that it has never seen, from a few clips and a few videos of its own: an adapter on all
// layers, and the scorer's verdict on the new colour and on the old ones before and after.

// Reading the word is not enough: a network that knows six colours draws what lies between two of them as patches of both.
const LAYERS = [
  ...['context_embedder', 'x_embedder', 'text_embedder.linear_1', 'text_embedder.linear_2'],
  ...['to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out'],
  ...['ff.net.0.proj', 'ff.net.2', 'ff_context.net.0.proj', 'ff_context.net.2', 'proj_mlp', 'proj_out'],
  ...['norm1.linear', 'norm1_context.linear', 'norm.linear', 'norm_out.linear'],
]

/** Crosses and triangles are the hardest: there are more of them, one on each background. */
const SHAPE_TURNS = 'cross triangle circle square cross triangle triangle circle cross square'.split(' ')

/** By how much a pixel differs from the corner's colour, of 255, where a shape is. */
const STANDS_OUT = 60

const { values: args } = parseArgs({
  options: {
    model: { type: 'string', default: 'examples/shapes/model' },
    out: { type: 'string', default: 'runs/finetune' },
    colour: { type: 'string', default: 'purple' },
    rgb: { type: 'string', default: '130,60,200' },
    clips: { type: 'string', default: '10' },
    /** Videos of old colours, made by the model itself, to be trained on as well: they hold what it knows. */
    prior: { type: 'string', default: '100' },
    /** How often a new clip is shown beside one of those, each time in another place. */
    copies: { type: 'string', default: '16' },
    'own-copies': { type: 'string', default: '2' },
    /** Of so many own videos one is shown without its caption: guidance leads away from what is drawn then. */
    uncaptioned: { type: 'string', default: '4' },
    steps: { type: 'string', default: '3500' },
    rank: { type: 'string', default: '16' },
    'learning-rate': { type: 'string', default: '1.5e-3' },
    targets: { type: 'string', default: LAYERS.join(',') },
    prompts: { type: 'string', default: '24' },
    seed: { type: 'string', default: '1' },
    /** Learn the model's own videos as they are, not what the model does with them. */
    forget: { type: 'boolean', default: false },
    'skip-before': { type: 'boolean', default: false },
  },
})
const seed = Number(args.seed)
const steps = Number(args.steps)
const base = join(args.out, 'base')
const rgb = args.rgb.split(',').map(Number) as unknown as Rgb
const palette: Palette = { ...COLOURS, [args.colour]: rgb }
const attributes = ['colour', 'shape', 'motion', 'background'] as const

type Spec = Parameters<typeof renderClip>[0]
interface Score {
  n: number
  colour: number
  shape: number
  motion: number
  background: number
  /** Colour, shape and motion right at once. */
  all: number
}

await main()

async function main(): Promise<void> {
  await rm(args.out, { recursive: true, force: true })
  cpSync(args.model, base, { recursive: true })
  const data = await encodeClips()
  const before = args['skip-before'] ? undefined : await evaluate('before', [])
  const { adapter, ...training } = await train(data)
  const after = await evaluate('after', [{ path: adapter, scale: 1 }])
  const clips = { new: Number(args.clips), own: Number(args.prior) }
  const result = { colour: args.colour, clips, steps, training, before, after }
  data.dispose()
  await writeFileAtomically(join(args.out, 'result.json'), `${JSON.stringify(result, null, 2)}\n`)
  console.log(table(result))
}

/** The few clips of the new colour, as a user would have them: video files and captions; and beside them the model's own. */
async function encodeClips(): Promise<LatentDataset> {
  const clips = join(args.out, 'clips')
  await mkdir(clips, { recursive: true })
  const lines: string[] = []
  const rng = makeRng(seed)
  const write = async (name: string, frames: Uint8Array, text: string, copies: number): Promise<void> => {
    const shape = extentOf(frames)
    for (let k = 0; k < copies; k++) {
      const video = `${name}-${k}.mp4`
      const shown = k === 0 ? frames : moved(frames, shape, rng)
      await encodeMp4(join(clips, video), shown, { width: SIZE, height: SIZE, fps: FPS })
      lines.push(`${JSON.stringify({ video, text })}\n`)
    }
  }
  for (let i = 0; i < Number(args.clips); i++) {
    const spec: Spec = { ...varied(rng, i), colour: args.colour, rgb }
    await write(`new-${i}`, renderClip(spec), caption(spec), Number(args.copies))
  }
  const pipeline = await Pipeline.load(base, { dtype: 'bf16' })
  for (let i = 0; i < Number(args.prior); i++) {
    const prompt = caption(randomSpec(rng, 'train'))
    const { frames } = await pipeline.generate({ prompt, seed: seed + i }).result()
    await write(`own-${i}`, frames, prompt, Number(args['own-copies']))
  }
  pipeline.dispose()
  await writeFileAtomically(join(clips, 'captions.jsonl'), lines.join(''))
  const videos = await openDataset(clips, { width: SIZE, height: SIZE, frames: FRAMES, fps: FPS })
  const vae = await CausalVideoVAE.fromPretrained(join(base, 'causal_video_vae'), { dtype: 'bf16' })
  const latents = join(args.out, 'latents')
  await encodeLatents(vae, videos, latents)
  vae.dispose()
  return LatentDataset.open(latents)
}

interface Extent {
  left: number
  top: number
  right: number
  bottom: number
}

/** Where over the whole clip something stands out from the colour of the first pixel. */
function extentOf(frames: Uint8Array): Extent {
  const row = SIZE * 3
  const found: Extent = { left: SIZE, top: SIZE, right: 0, bottom: 0 }
  const far = (at: number, c: number): boolean =>
    Math.abs((frames[at + c] as number) - (frames[c] as number)) >= STANDS_OUT
  for (let at = 0; at < frames.length; at += 3) {
    if (!far(at, 0) && !far(at, 1) && !far(at, 2)) continue
    const [x, y] = [(at % row) / 3, Math.floor(at / row) % SIZE]
    found.left = Math.min(found.left, x)
    found.right = Math.max(found.right, x)
    found.top = Math.min(found.top, y)
    found.bottom = Math.max(found.bottom, y)
  }
  return found
}

/**
 * The clip moved to another place, as far as nothing of what stands out leaves the picture: few clips would else teach
 * where their shapes are. What is missing at a border is what the border shows.
 */
function moved(frames: Uint8Array, { left, top, right, bottom }: Extent, rng: () => number): Uint8Array {
  const row = SIZE * 3
  const within = (low: number, high: number): number =>
    low > high ? 0 : Math.round(rng() * (SIZE - 1 - (high - low))) - low
  const [dx, dy] = [within(left, right), within(top, bottom)]
  const inside = (v: number): number => Math.min(SIZE - 1, Math.max(0, v))
  const out = new Uint8Array(frames.length)
  for (let at = 0; at < out.length; at += 3) {
    const [x, y] = [(at % row) / 3, Math.floor(at / row) % SIZE]
    const frame = at - (at % (row * SIZE))
    const from = frame + inside(y - dy) * row + inside(x - dx) * 3
    for (let c = 0; c < 3; c++) out[at + c] = frames[from + c] as number
  }
  return out
}

function isNew({ captions }: LatentSource, index: number): boolean {
  return (captions[index] as string).includes(args.colour)
}

/** The same clips, some of the old colours without their captions. */
function someUncaptioned(data: LatentSource): LatentSource {
  let own = 0
  const captions = data.captions.map((text, i) =>
    !isNew(data, i) && ++own % Number(args.uncaptioned) === 0 ? '' : text,
  )
  const { length, normalisation, buckets } = data
  return { length, captions, normalisation, buckets, gather: (indices) => data.gather(indices) }
}

/** Shapes, backgrounds and motions take turns: what all clips share besides the colour would be learned with it. */
function varied(rng: () => number, i: number): ReturnType<typeof randomSpec> {
  for (;;) {
    const spec = randomSpec(rng, 'all')
    const turns = [
      [SHAPE_TURNS, spec.shape],
      [BACKGROUND_NAMES, spec.background],
      [MOTIONS, spec.motion],
    ] as const
    if (turns.every(([names, name]) => names[i % names.length] === name)) return spec
  }
}

async function train(data: LatentDataset): Promise<{ seconds: number; cpuSeconds: number; adapter: string }> {
  const targets = args.targets.split(',')
  const texts = join(args.out, 'text')
  await encodeTexts(base, data.captions, texts)
  const text = await CachedTextEncoder.open(texts)
  const tune = await FineTune.open(base, { text, lora: { rank: Number(args.rank), seed, targets } })
  const began = performance.now()
  const cpu = process.cpuUsage()
  const trainer = new Trainer({
    ...tune.parts(
      someUncaptioned(data),
      { steps, colour: args.colour },
      args.forget ? undefined : (i) => !isNew(data, i),
    ),
    out: join(args.out, 'run'),
    steps,
    batchSize: 10,
    sampleRatios: [1, 2, 2],
    imageRatio: 0.5,
    posterior: 'mean',
    // What the model shows without a caption should not become the new colour: guidance leads away from it.
    captionDrop: 0,
    seed,
    learningRate: Number(args['learning-rate']),
    minLearningRate: 5e-5,
    warmupSteps: Math.min(20, steps),
    schedule: 'cosine',
    optimizer: { emaDecay: 0.98, weightDecay: 1e-3 },
  })
  for await (const event of trainer.run()) {
    if (event.type !== 'step' || (event.step % 25 !== 0 && event.step > 2)) continue
    console.error(`step ${event.step}: loss ${event.loss.toFixed(4)} (${event.seconds.toFixed(2)} s)`)
  }
  const adapter = await tune.save(trainer, args.out)
  const seconds = (performance.now() - began) / 1000
  const { user, system } = process.cpuUsage(cpu)
  trainer.dispose()
  tune.dispose()
  text.dispose()
  return { seconds, cpuSeconds: (user + system) / 1e6, adapter }
}

/** Scores of generated videos of the new colour and of the old ones, each with shapes and motions drawn at random. */
async function evaluate(
  when: string,
  adapters: { path: string; scale: number }[],
): Promise<{ new: Score; old: Score }> {
  const pipeline = await Pipeline.load(base, { dtype: 'bf16', adapters })
  const rng = makeRng(seed + 1000)
  const scores = {} as { new: Score; old: Score }
  const sheet: { frames: Uint8Array; width: number; height: number; label: string }[] = []
  for (const group of ['new', 'old'] as const) {
    const score: Score = { n: 0, colour: 0, shape: 0, motion: 0, background: 0, all: 0 }
    for (let i = 0; i < Number(args.prompts); i++) {
      const drawn = randomSpec(rng, 'train')
      const spec: Spec = group === 'new' ? { ...drawn, colour: args.colour, rgb } : drawn
      const prompt = caption(spec)
      const video = await pipeline.generate({ prompt, seed: 1000 + i }).result()
      const verdict = scoreClip(video.frames, video, palette)
      const right = attributes.map((name) => verdict[name] === spec[name])
      attributes.forEach((name, k) => {
        score[name] += Number(right[k])
      })
      score.n++
      score.all += Number(right[0] && right[1] && right[2])
      console.error(`${when} ${right.map((ok) => (ok ? '+' : '-')).join('')} ${prompt} (${verdict.colour})`)
      if (i < 6) sheet.push({ ...video, label: prompt })
    }
    scores[group] = score
  }
  pipeline.dispose()
  await contactSheet(join(args.out, `${when}.png`), sheet, { columns: 1, framesPerClip: 6, frameHeight: 96 })
  return scores
}

function table(result: {
  colour: string
  training: { seconds: number; cpuSeconds: number }
  before: { new: Score; old: Score } | undefined
  after: { new: Score; old: Score }
}): string {
  const percent = (score: Score, key: keyof Score): string => `${Math.round((100 * score[key]) / score.n)} %`
  const row = (when: string, what: string, score: Score): string =>
    `| ${what} | ${when} | ${[...attributes, 'all' as const].map((key) => percent(score, key)).join(' | ')} |`
  const lines = [
    `| ${Number(args.prompts)} prompts of | | colour | shape | motion | background | colour, shape and motion |`,
    '|---|---|---|---|---|---|---|',
  ]
  for (const [group, what] of [
    ['new', result.colour],
    ['old', 'the old colours'],
  ] as const) {
    if (result.before) lines.push(row('before', what, result.before[group]))
    lines.push(row('after', what, result.after[group]))
  }
  const { seconds, cpuSeconds } = result.training
  return `${lines.join('\n')}\n\nTrained for ${seconds.toFixed(0)} s, ${cpuSeconds.toFixed(0)} s of processor time`
}
