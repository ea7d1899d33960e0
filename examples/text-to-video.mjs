// node examples/text-to-video.mjs [model folder] [output]
import { Pipeline } from 'pyraflow'

const [model = 'examples/shapes/model', out = 'circle.webp'] = process.argv.slice(2)
const pipeline = await Pipeline.load(model)
const generation = pipeline.generate({ prompt: 'a red circle moving right on a black background', seed: 1 })
for await (const event of generation) {
  if (event.type === 'progress') {
    const { done, total, etaMs } = event
    process.stderr.write(`step ${done} of ${total}, ${Math.ceil(etaMs / 1000)} s left\n`)
  } else if (event.type === 'warning') console.warn(event.message)
}
console.log((await generation.save(out)).join('\n'))
pipeline.dispose()
