// node examples/worker.mjs [model folder] [output]
// The model lives in a worker and hands its frames to the main thread.
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads'
import { Pipeline } from 'pyraflow'

const [model = 'examples/shapes/model', out = 'worker.webp'] = process.argv.slice(2)

if (isMainThread) {
  const prompt = 'a red circle moving right on a black background'
  const worker = new Worker(new URL(import.meta.url), { workerData: { model, out, prompt } })
  worker.on('message', ({ first, count, frames }) => {
    console.log(`frames ${first} to ${first + count - 1}: ${frames.length} bytes`)
  })
  worker.on('error', (error) => {
    console.error(error)
    process.exitCode = 1
  })
} else {
  const pipeline = await Pipeline.load(workerData.model)
  const generation = pipeline.generate({ prompt: workerData.prompt })
  for await (const event of generation) {
    if (event.type !== 'frames') continue
    // The video keeps its own frames until it is saved, so the reader gets a copy to own.
    const frames = event.frames.slice()
    parentPort?.postMessage({ ...event, frames }, [frames.buffer])
  }
  await generation.save(workerData.out)
  pipeline.dispose()
}
