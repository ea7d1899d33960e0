import { createRequire } from 'node:module'
import { join } from 'node:path'
import { engine } from '../lib/engine/engine.ts'

// Another implementation of attention, measured in the same process. It is no dependency: whoever wants the comparison
// installs it for the occasion.

/** Multi-head attention [1, L, H·D] in f32, by another library. */
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

/** onnxruntime's MultiHeadAttention on as many threads as the engine has. */
export async function onnxAttention(ort: Ort, length: number, heads: number, headDim: number): Promise<Peer> {
  const width = heads * headDim
  const session = await ort.InferenceSession.create(attentionModel(length, heads, width), {
    intraOpNumThreads: engine.device.threads,
    interOpNumThreads: 1,
    graphOptimizationLevel: 'all',
  })
  const input = (seed: number): unknown => {
    const values = Float32Array.from(
      { length: length * width },
      (_, i) => (Math.imul(i + seed, 0x9e3779b1) >> 8) / 2 ** 23,
    )
    return new ort.Tensor('float32', values, [1, length, width])
  }
  const feeds = { q: input(1), k: input(2), v: input(3) }
  await session.run(feeds)
  return {
    name: 'onnxruntime MultiHeadAttention, f32',
    async seconds(count) {
      const begin = performance.now()
      for (let i = 0; i < count; i++) await session.run(feeds)
      return (performance.now() - begin) / 1000 / count
    },
    close: () => session.release(),
  }
}

// The few fields of the ONNX protocol buffers that a graph of one node needs, by their numbers.
const varint = (value: number): number[] =>
  value < 128 ? [value] : [(value & 127) | 128, ...varint(value >>> 7)]
const number = (field: number, value: number): number[] => [...varint(field << 3), ...varint(value)]
const bytes = (field: number, value: ArrayLike<number>): number[] => [
  ...varint((field << 3) | 2),
  ...varint(value.length),
  ...Array.from(value),
]
const text = (field: number, value: string): number[] => bytes(field, new TextEncoder().encode(value))

function attentionModel(length: number, heads: number, width: number): Uint8Array {
  const FLOAT = 1
  const INT = 2
  const value = (name: string): number[] => {
    const dims = [1, length, width].flatMap((n) => bytes(1, number(1, n)))
    return [...text(1, name), ...bytes(2, bytes(1, [...number(1, FLOAT), ...bytes(2, dims)]))]
  }
  const node = [
    ...['q', 'k', 'v'].flatMap((name) => text(1, name)),
    ...text(2, 'o'),
    ...text(4, 'MultiHeadAttention'),
    ...bytes(5, [...text(1, 'num_heads'), ...number(3, heads), ...number(20, INT)]),
    ...text(7, 'com.microsoft'),
  ]
  const graph = [
    ...bytes(1, node),
    ...text(2, 'attention'),
    ...['q', 'k', 'v'].flatMap((name) => bytes(11, value(name))),
    ...bytes(12, value('o')),
  ]
  const operators = (domain: string, version: number): number[] =>
    bytes(8, [...text(1, domain), ...number(2, version)])
  return Uint8Array.from([
    ...number(1, 8),
    ...bytes(7, graph),
    ...operators('', 17),
    ...operators('com.microsoft', 1),
  ])
}
