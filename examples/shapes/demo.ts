import { mkdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { engine, Pipeline } from '../../lib/index.ts'
import { type ContactClip, contactSheet } from '../../lib/io/contact-sheet.ts'
import { hasFfmpeg } from '../../lib/io/video.ts'

// Generates three short videos with the toy model that comes with the sources.
const out = resolve(process.argv[2] ?? 'demo-out')
const model = process.argv[3] ?? 'examples/shapes/model'
const jobs = [
  { prompt: 'a red circle moving right on a black background', seed: 1 },
  { prompt: 'a green square moving down on a white background', seed: 2 },
  { prompt: 'a yellow triangle moving left on a grey background', seed: 3 },
]

mkdirSync(out, { recursive: true })
const pipeline = await Pipeline.load(model, { dtype: 'bf16' })
console.log(`engine: ${engine.device.backend}, ${engine.device.threads} threads`)
const extension = (await hasFfmpeg()) ? 'mp4' : 'webp'
const clips: ContactClip[] = []
for (const job of jobs) {
  const began = performance.now()
  const generation = pipeline.generate(job)
  for await (const event of generation) {
    if (event.type === 'progress' && process.stderr.isTTY) {
      process.stderr.write(`\r  ${job.prompt}: step ${event.done} of ${event.total} `)
    }
  }
  if (process.stderr.isTTY) process.stderr.write('\r\x1b[K')
  const name = job.prompt.split(' ').slice(1, 5).join('-')
  const video = await generation.result()
  for (const ending of new Set(['webp', extension])) await video.save(join(out, `${name}.${ending}`))
  const seconds = (performance.now() - began) / 1000
  console.log(
    `"${job.prompt}" seed ${job.seed}: ${(seconds / video.count).toFixed(3)} s a frame → ${join(out, name)}.${extension}`,
  )
  clips.push({ ...video, label: job.prompt })
}
await contactSheet(join(out, 'contact-sheet.png'), clips, { columns: 1, framesPerClip: 8, frameHeight: 128 })
console.log(`contact sheet → ${join(out, 'contact-sheet.png')}`)
pipeline.dispose()
