// ONNX models as bytes, built by hand: the few fields of its protocol buffers that a graph needs, by their numbers.

const FLOAT = 1
const INT64 = 7

/** An attribute of a node: whole numbers, lists of them, or a float. */
export type Attribute = number | readonly number[] | { readonly float: number }

/** One operator. */
export interface Node {
  readonly op: string
  readonly inputs: readonly string[]
  readonly outputs: readonly string[]
  readonly attributes?: Readonly<Record<string, Attribute>>
  /** `com.microsoft` for onnxruntime's own. */
  readonly domain?: string
}

/** A constant of the graph. */
export interface Constant {
  readonly shape: readonly number[]
  readonly data: Float32Array | BigInt64Array
}

/** What a model computes. */
export interface Graph {
  readonly nodes: readonly Node[]
  readonly constants?: Readonly<Record<string, Constant>>
  readonly inputs: Readonly<Record<string, readonly number[]>>
  readonly outputs: Readonly<Record<string, readonly number[]>>
}

type Bytes = Uint8Array

function join(parts: readonly Bytes[]): Bytes {
  const whole = new Uint8Array(parts.reduce((n, part) => n + part.length, 0))
  let at = 0
  for (const part of parts) {
    whole.set(part, at)
    at += part.length
  }
  return whole
}

function varint(value: number): number[] {
  const digits: number[] = []
  let rest = value
  for (; rest >= 128; rest = Math.floor(rest / 128)) digits.push((rest % 128) + 128)
  return [...digits, rest]
}

const number = (field: number, value: number): Bytes =>
  Uint8Array.from([...varint(field << 3), ...varint(value)])
const bytes = (field: number, value: Bytes): Bytes =>
  join([Uint8Array.from([...varint((field << 3) | 2), ...varint(value.length)]), value])
const text = (field: number, value: string): Bytes => bytes(field, new TextEncoder().encode(value))
const float = (field: number, value: number): Bytes =>
  join([Uint8Array.from(varint((field << 3) | 5)), new Uint8Array(Float32Array.of(value).buffer)])

function attributeBytes(name: string, value: Attribute): Bytes {
  const [FLOAT_TYPE, INT_TYPE, INTS_TYPE] = [1, 2, 7]
  if (typeof value === 'number') return join([text(1, name), number(3, value), number(20, INT_TYPE)])
  if ('float' in value) return join([text(1, name), float(2, value.float), number(20, FLOAT_TYPE)])
  return join([text(1, name), ...value.map((n) => number(8, n)), number(20, INTS_TYPE)])
}

function nodeBytes({ op, inputs, outputs, attributes = {}, domain }: Node): Bytes {
  return join([
    ...inputs.map((name) => text(1, name)),
    ...outputs.map((name) => text(2, name)),
    text(4, op),
    ...Object.entries(attributes).map(([name, value]) => bytes(5, attributeBytes(name, value))),
    ...(domain ? [text(7, domain)] : []),
  ])
}

function constantBytes(name: string, { shape, data }: Constant): Bytes {
  const raw = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
  const type = data instanceof Float32Array ? FLOAT : INT64
  return join([...shape.map((n) => number(1, n)), number(2, type), text(8, name), bytes(9, raw)])
}

function valueBytes(name: string, shape: readonly number[]): Bytes {
  const dims = join(shape.map((n) => bytes(1, number(1, n))))
  return join([text(1, name), bytes(2, bytes(1, join([number(1, FLOAT), bytes(2, dims)])))])
}

/** The model of a graph. */
export function onnxModel({ nodes, constants = {}, inputs, outputs }: Graph): Bytes {
  const graph = join([
    ...nodes.map((node) => bytes(1, nodeBytes(node))),
    text(2, 'graph'),
    ...Object.entries(constants).map(([name, constant]) => bytes(5, constantBytes(name, constant))),
    ...Object.entries(inputs).map(([name, shape]) => bytes(11, valueBytes(name, shape))),
    ...Object.entries(outputs).map(([name, shape]) => bytes(12, valueBytes(name, shape))),
  ])
  const operators = (domain: string, version: number): Bytes =>
    bytes(8, join([text(1, domain), number(2, version)]))
  return join([number(1, 8), bytes(7, graph), operators('', 17), operators('com.microsoft', 1)])
}
