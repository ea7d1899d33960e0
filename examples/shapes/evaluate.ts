import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { Pipeline } from '../../lib/index.ts'
import { writeFileAtomically } from '../../lib/io/atomic.ts'
import { contactSheet } from '../../lib/io/contact-sheet.ts'
import { makePrompts } from './prompts.ts'
import { scoreClip } from './scorer.ts'

// Generates a video for every prompt and lets the scorer read colour, shape and motion back.
const { values: args } = parseArgs({
  options: {
    model: { type: 'string', default: 'examples/shapes/model' },
    count: { type: 'string', default: '60' },
    seed: { type: 'string', default: '100' },
    dtype: { type: 'string', default: 'bf16' },
    quantize: { type: 'string' },
    out: { type: 'string', default: 'runs/shapes/evaluation' },
    guidance: { type: 'string' },
    'video-guidance': { type: 'string' },
    steps: { type: 'string' },
    'video-steps': { type: 'string' },
    'guidance-stop': { type: 'string', default: '1' },
    'history-cache': { type: 'string', default: '1' },
    'history-window': { type: 'string' },
    frames: { type: 'string' },
  },
})

const list = (text: string): number[] => text.split(',').map(Number)
const pipeline = await Pipeline.load(args.model, {
  dtype: args.dtype === 'f32' ? 'f32' : 'bf16',
  ...(args.quantize === 'int8' ? { quantize: args.quantize } : {}),
})
const prompts = makePrompts(Number(args.count), Number(args.seed))
const attributes = ['colour', 'shape', 'motion', 'background'] as const
const counts = { seen: { n: 0, all: 0 }, heldOut: { n: 0, all: 0 } } as Record<string, Record<string, number>>
const sheet: { frames: Uint8Array; width: number; height: number; label: string }[] = []
const began = performance.now()
for (const [i, prompt] of prompts.entries()) {
  const video = await pipeline
    .generate({
      prompt: prompt.text,
      seed: 1000 + i,
      guidanceStop: Number(args['guidance-stop']),
      historyCache: Number(args['history-cache']),
      ...(args['history-window'] ? { historyWindow: Number(args['history-window']) } : {}),
      ...(args.frames ? { frames: Number(args.frames) } : {}),
      ...(args.guidance ? { guidanceScale: Number(args.guidance) } : {}),
      ...(args['video-guidance'] ? { videoGuidanceScale: Number(args['video-guidance']) } : {}),
      ...(args.steps ? { steps: list(args.steps) } : {}),
      ...(args['video-steps'] ? { videoSteps: list(args['video-steps']) } : {}),
    })
    .result()
  const score = scoreClip(video.frames, video)
  const right = attributes.map((name) => score[name] === prompt.spec[name])
  const group = counts[prompt.heldOut ? 'heldOut' : 'seen'] as Record<string, number>
  group.n = (group.n ?? 0) + 1
  attributes.forEach((name, k) => {
    group[name] = (group[name] ?? 0) + Number(right[k])
  })
  group.all = (group.all ?? 0) + Number(right[0] && right[1] && right[2])
  console.error(
    `${right.map((ok) => (ok ? '+' : '-')).join('')} ${prompt.text}${prompt.heldOut ? ' (held out)' : ''}`,
  )
  if (sheet.length < 12) sheet.push({ ...video, label: prompt.text })
}
const seconds = (performance.now() - began) / 1000
const total: Record<string, number> = {}
for (const group of Object.values(counts))
  for (const [k, v] of Object.entries(group)) total[k] = (total[k] ?? 0) + v
const result = { ...counts, total, secondsPerVideo: seconds / prompts.length }
await contactSheet(`${args.out}.png`, sheet, { columns: 1, framesPerClip: 6, frameHeight: 96 })
await writeFileAtomically(join(`${args.out}.json`), `${JSON.stringify(result, null, 2)}\n`)
console.log(JSON.stringify(result, null, 2))
