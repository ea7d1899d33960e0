import { createRequire } from 'node:module'
import { join } from 'node:path'
import { engine } from '../lib/engine/engine.ts'
import { type Graph, onnxModel } from './onnx.ts'

// Other implementations, measured in the same process. They are no dependencies: whoever wants the comparison installs
// them for the occasion.

/** A graph in f32, run by another library. */
export interface Peer {
  name: string
  /** Mean seconds of one call, of `count`. */
  seconds(count: number): Promise<number>
  close(): Promise<void>
}

export const INSTALL = 'npm install --no-save --ignore-scripts onnxruntime-node@1.30.0'

interface OrtSession {
  run(feeds: Record<string, unknown>): Promise<unknown>
  release(): Promise<void>
}
interface Ort {
  InferenceSession: { create(model: Uint8Array, options: object): Promise<OrtSession> }
  Tensor: new (type: 'float32', data: Float32Array, dims: number[]) => unknown
}

/** The package, looked for from where the command is run; undefined when it is not installed. */
export function findOnnxRuntime(): Ort | undefined {
  try {
    return createRequire(join(process.cwd(), 'package.json'))('onnxruntime-node') as Ort
  } catch {
    return undefined
  }
}

/** Numbers between −1 and 1 that depend on the seed alone. */
export function noise(count: number, seed: number, size = 1): Float32Array {
  return Float32Array.from(
    { length: count },
    (_, i) => ((Math.imul(i + seed, 0x9e3779b1) >> 8) / 2 ** 23) * size,
  )
}

/** onnxruntime on as many threads as the engine has. */
export async function onnxPeer(ort: Ort, name: string, graph: Graph): Promise<Peer> {
  const session = await ort.InferenceSession.create(onnxModel(graph), {
    intraOpNumThreads: engine.device.threads,
    interOpNumThreads: 1,
    graphOptimizationLevel: 'all',
  })
  const feeds = Object.fromEntries(
    Object.entries(graph.inputs).map(([input, shape], i) => {
      const count = shape.reduce((a, b) => a * b, 1)
      return [input, new ort.Tensor('float32', noise(count, i + 1), [...shape])]
    }),
  )
  await session.run(feeds)
  return {
    name: `onnxruntime ${name}, f32`,
    async seconds(count) {
      const begin = performance.now()
      for (let i = 0; i < count; i++) await session.run(feeds)
      return (performance.now() - begin) / 1000 / count
    },
    close: () => session.release(),
  }
}

/** onnxruntime's MultiHeadAttention. */
export function onnxAttention(ort: Ort, length: number, heads: number, headDim: number): Promise<Peer> {
  const shape = [1, length, heads * headDim]
  return onnxPeer(ort, 'MultiHeadAttention', {
    nodes: [
      {
        op: 'MultiHeadAttention',
        ...{
          inputs: ['q', 'k', 'v'],
          outputs: ['o'],
          attributes: { num_heads: heads },
          domain: 'com.microsoft',
        },
      },
    ],
    inputs: { q: shape, k: shape, v: shape },
    outputs: { o: shape },
  })
}
