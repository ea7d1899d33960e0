// node examples/commonjs.cjs [model folder] [output]
const { Pipeline } = require('pyraflow')

async function main() {
  const [model = 'examples/shapes/model', out = 'commonjs.webp'] = process.argv.slice(2)
  const pipeline = await Pipeline.load(model)
  const generation = pipeline.generate({ prompt: 'a red circle moving right on a black background' })
  console.log((await generation.save(out)).join('\n'))
  pipeline.dispose()
}

main().catch((error) => {
  console.error(error)
  process.exitCode = 1
})
