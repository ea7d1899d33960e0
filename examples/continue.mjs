// node examples/continue.mjs [model folder] [output]
// Continues a video under another prompt, here from the latents that were saved with it.
import { Pipeline } from 'pyraflow'

const [model = 'examples/shapes/model', out = 'longer.webp'] = process.argv.slice(2)
const pipeline = await Pipeline.load(model)
const prompt = 'a red circle moving right on a black background'
await pipeline.generate({ prompt, seed: 3 }).save('begun.webp', { latents: true })

// Another day, another process.
const generation = pipeline.generate({
  prompt: 'a red circle moving left on a black background',
  seed: 3,
  continueFrom: 'begun.webp.latents.safetensors',
  seconds: 1,
})
console.log((await generation.save(out)).join('\n'))
pipeline.dispose()
