// node examples/image-to-video.mjs [model folder] [output] [picture]
// Without a picture the first frame is generated, too: a video of one frame is an image.
import { Pipeline } from 'pyraflow'

const [model = 'examples/shapes/model', out = 'moving.webp', picture] = process.argv.slice(2)
const prompt = 'a blue square moving left on a black background'
const pipeline = await Pipeline.load(model)

/** @returns {Promise<import('pyraflow').ImageSource>} */
async function makePicture() {
  const { frames: data, width, height } = await pipeline.generate({ prompt, frames: 1 }).result()
  return { data, width, height }
}

const generation = pipeline.generate({ prompt, image: picture ?? (await makePicture()) })
console.log((await generation.save(out)).join('\n'))
pipeline.dispose()
