// node examples/http-stream.mjs [model folder] [port]
// Open http://localhost:8080/?prompt=a+red+circle+moving+right+on+a+black+background in a browser: frames appear as
// their units are made. Closing the page ends the generation.
import { createServer } from 'node:http'
import { Pipeline, PyraflowError } from 'pyraflow'
import sharp from 'sharp'

const [model = 'examples/shapes/model', port = '8080'] = process.argv.slice(2)
const pipeline = await Pipeline.load(model)

const server = createServer(async (request, response) => {
  const { searchParams } = new URL(request.url ?? '/', 'http://localhost')
  const stop = new AbortController()
  response.on('close', () => stop.abort())
  try {
    const generation = pipeline.generate({
      prompt: searchParams.get('prompt') ?? '',
      seed: Number(searchParams.get('seed') ?? 0),
      signal: stop.signal,
    })
    for await (const event of generation) {
      if (event.type !== 'frames') continue
      if (!response.headersSent) {
        response.writeHead(200, { 'content-type': 'multipart/x-mixed-replace; boundary=frame' })
      }
      const { frames, count, width, height } = event
      const size = width * height * 3
      for (let i = 0; i < count; i++) {
        const raw = { width, height, channels: /** @type {const} */ (3) }
        const jpeg = await sharp(frames.subarray(i * size, (i + 1) * size), { raw })
          .jpeg()
          .toBuffer()
        response.write(`--frame\r\ncontent-type: image/jpeg\r\ncontent-length: ${jpeg.length}\r\n\r\n`)
        response.write(jpeg)
        response.write('\r\n')
      }
    }
    response.end('--frame--\r\n')
  } catch (error) {
    if (stop.signal.aborted) return
    const wrong = error instanceof PyraflowError && error.code === 'ERR_OPTION'
    if (!response.headersSent) response.writeHead(wrong ? 400 : 500, { 'content-type': 'text/plain' })
    response.end(error instanceof Error ? error.message : String(error))
  }
})
server.listen(Number(port), () => {
  const address = server.address()
  console.log(`http://localhost:${typeof address === 'object' ? address?.port : address}/`)
})
