import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import { writeFileAtomic } from '../lib/io/atomic-stream.ts'
import { findWeights, readConfig, writePretrained } from '../lib/io/pretrained.ts'
import {
  dtypeBytes,
  openSafetensors,
  openWeights,
  type TensorToWrite,
  writeSafetensors,
} from '../lib/io/safetensors.ts'
import { golden } from './golden.ts'

let folder: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'pyraflow-safetensors-'))
})
afterEach(() => {
  vi.restoreAllMocks()
  rmSync(folder, { recursive: true, force: true })
})

const code = (expected: string): unknown => expect.objectContaining({ code: expected })

/** A file with a header as given, written without any of the library's code. */
function rawFile(header: unknown, dataBytes: number, declaredLength?: bigint): string {
  const json = Buffer.isBuffer(header)
    ? header
    : Buffer.from(typeof header === 'string' ? header : JSON.stringify(header))
  const lead = Buffer.alloc(8)
  lead.writeBigUInt64LE(declaredLength ?? BigInt(json.length))
  const path = join(folder, 'raw.safetensors')
  writeFileSync(path, Buffer.concat([lead, json, Buffer.alloc(dataBytes)]))
  return path
}

describe('a safetensors file', () => {
  it('comes back as it was written, for every element type', async () => {
    const path = join(folder, 'all.safetensors')
    const tensors: TensorToWrite[] = [
      { name: 'odd', dtype: 'U8', shape: [3], data: Uint8Array.of(1, 2, 3) },
      { name: 'f32', dtype: 'F32', shape: [2, 2], data: Float32Array.of(1, -0, Number.NaN, 3.5) },
      { name: 'f64', dtype: 'F64', shape: [1], data: Float64Array.of(Math.PI) },
      { name: 'i64', dtype: 'I64', shape: [2], data: BigInt64Array.of(-1n, 2n ** 62n) },
      { name: 'i32', dtype: 'I32', shape: [1, 1, 1], data: Int32Array.of(-7) },
      { name: 'bool', dtype: 'BOOL', shape: [2], data: Uint8Array.of(0, 1) },
      { name: 'scalar', dtype: 'F32', shape: [], data: Float32Array.of(9) },
      { name: 'empty', dtype: 'F32', shape: [0, 4], data: new Float32Array(0) },
      { name: '__proto__', dtype: 'I8', shape: [1], data: Int8Array.of(-3) },
      { name: 'late', dtype: 'U16', shape: [2], data: async () => Uint16Array.of(5, 6) },
    ]
    await writeSafetensors(path, tensors, { note: 'ünïcode' })
    const file = openSafetensors(path)
    expect(file.metadata).toEqual({ note: 'ünïcode' })
    expect(file.entries.size).toBe(tensors.length)
    for (const { name, dtype, shape, data } of tensors) {
      const entry = file.entries.get(name)
      expect(entry).toMatchObject({ dtype, shape, file: path })
      expect(file.readArray(name)).toEqual(typeof data === 'function' ? await data() : data)
      // A memory mapping starts at a page, so this offset is the tensor's alignment.
      expect((entry?.begin ?? 1) % dtypeBytes[dtype]).toBe(0)
    }
    expect(file.size).toBe(readFileSync(path).length)
  })

  it('widens bfloat16 and half floats exactly', async () => {
    const path = join(folder, 'half.safetensors')
    const bfloat = Uint16Array.of(0x3f80, 0xc000, 0x0001, 0x7f80, 0x7fc0, 0x4049)
    const half = Uint16Array.of(0x3c00, 0xc000, 0x0001, 0x7c00, 0x7e00, 0x7bff, 0x3555)
    await writeSafetensors(path, [
      { name: 'bf16', dtype: 'BF16', shape: [6], data: bfloat },
      { name: 'f16', dtype: 'F16', shape: [7], data: half },
      { name: 'f64', dtype: 'F64', shape: [1], data: Float64Array.of(0.1) },
      { name: 'ids', dtype: 'I32', shape: [1], data: Int32Array.of(1) },
    ])
    const file = openSafetensors(path)
    expect(file.readArray('bf16')).toEqual(bfloat)
    expect([...file.readFloats('bf16')]).toEqual([1, -2, 2 ** -133, Infinity, Number.NaN, 3.140625])
    expect([...file.readFloats('f16')]).toEqual([
      1,
      -2,
      2 ** -24,
      Infinity,
      Number.NaN,
      65504,
      0.333251953125,
    ])
    expect([...file.readFloats('f64')]).toEqual([Math.fround(0.1)])
    expect(() => file.readFloats('ids')).toThrow(/expected F32, F64, BF16 or F16, received I32/)
  })

  it('reads files of another writer', () => {
    const { tensors, json } = golden('scheduler_0')
    expect(tensors.entries.size).toBe(json.tensors.length)
    for (const { name, dtype, shape } of json.tensors) {
      expect(tensors.entries.get(name)).toMatchObject({ dtype, shape })
    }
    expect(tensors.readFloats('global_sigmas')[0]).toBe(1)
  })

  it('names a missing tensor and one that resembles it', async () => {
    const path = join(folder, 'a.safetensors')
    await writeSafetensors(path, [
      { name: 'dit.a.b.weight', dtype: 'U8', shape: [1], data: Uint8Array.of(1) },
    ])
    expect(() => openSafetensors(path).readArray('a.b.weight')).toThrow(/'a\.b\.weight'.*'dit\.a\.b\.weight'/)
  })

  it('is reported when it becomes shorter after its header was read', async () => {
    const path = join(folder, 'a.safetensors')
    await writeSafetensors(path, [{ name: 'x', dtype: 'F32', shape: [4], data: new Float32Array(4) }])
    const file = openSafetensors(path)
    writeFileSync(path, readFileSync(path).subarray(0, file.size - 4))
    expect(() => file.readArray('x')).toThrow(/expected 16 bytes, received 12 bytes/)
  })

  it('is an ERR_IO when it is missing or a folder', () => {
    expect(() => openSafetensors(join(folder, 'none.safetensors'))).toThrow(code('ERR_IO'))
    expect(() => openSafetensors(folder)).toThrow(code('ERR_IO'))
  })
})

describe('a damaged safetensors file', () => {
  const f32 = (shape: unknown, from: unknown, to: unknown): object => ({
    dtype: 'F32',
    shape,
    data_offsets: [from, to],
  })

  it.each([
    ['a header that is no JSON', '{"x": ', 0, /JSON/],
    ['a header that is no UTF-8', Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d]), 0, /not valid/],
    ['a header that is a list', [], 0, /JSON object/],
    ['a tensor that is no object', { x: 3 }, 0, /'x': expected an object/],
    ['no dtype', { x: { shape: [1], data_offsets: [0, 4] } }, 4, /'x' dtype/],
    ['an unknown dtype', { x: { dtype: 'F31', shape: [1], data_offsets: [0, 4] } }, 4, /received F31/],
    [
      'a dtype named like a method',
      { x: { dtype: 'toString', shape: [1], data_offsets: [0, 4] } },
      4,
      /dtype/,
    ],
    ['no shape', { x: { dtype: 'F32', data_offsets: [0, 4] } }, 4, /'x' shape/],
    ['no offsets', { x: { dtype: 'F32', shape: [1] } }, 4, /'x' data_offsets/],
    ['three offsets', { x: { dtype: 'F32', shape: [1], data_offsets: [0, 4, 8] } }, 4, /two integers/],
    ['a negative offset', { x: f32([1], -4, 0) }, 4, /data_offsets/],
    ['a fractional offset', { x: f32([1], 0, 4.5) }, 8, /data_offsets/],
    ['an end before its begin', { x: f32([1], 4, 0) }, 4, /begin ≤ end/],
    ['an end after the file', { x: f32([2], 0, 8) }, 4, /within the 4 bytes/],
    ['a negative dimension', { x: f32([-1, -1], 0, 4) }, 4, /shape/],
    ['a dimension that is no integer', { x: f32([1.5], 0, 6) }, 6, /shape/],
    ['a dimension beyond safe integers', { x: f32([2 ** 53], 0, 4) }, 4, /shape/],
    ['a product beyond safe integers', { x: f32([2 ** 40, 2 ** 40], 0, 4) }, 4, /2\^53/],
    ['bytes that do not fit the shape', { x: f32([2], 0, 4) }, 4, /8 bytes for F32 \[2\], received 4 bytes/],
    ['overlapping tensors', { x: f32([2], 0, 8), y: f32([2], 4, 12) }, 12, /overlap/],
    ['a hole between tensors', { x: f32([1], 0, 4), y: f32([1], 8, 12) }, 12, /hole/],
    ['a hole at the start', { x: f32([1], 4, 8) }, 8, /hole/],
    ['bytes after the last tensor', { x: f32([1], 0, 4) }, 5, /to end with the last tensor/],
    ['metadata that is no text', { __metadata__: { a: 1 } }, 0, /__metadata__/],
  ])('with %s is refused', (_what, header, bytes, message) => {
    const path = rawFile(header, bytes)
    expect(() => openSafetensors(path)).toThrow(code('ERR_CHECKPOINT'))
    expect(() => openSafetensors(path)).toThrow(message)
    expect(() => openSafetensors(path)).toThrow(path)
  })

  it.each([
    ['beyond the file', 1000n],
    ['of more than 100 MB', 200_000_000n],
    ['beyond 2^53', 2n ** 63n],
  ])('with a header length %s is refused before anything is allocated', (_what, length) => {
    expect(() => openSafetensors(rawFile({}, 0, length))).toThrow(/header length/)
  })

  it.each([0, 7])('of %i bytes is refused', (bytes) => {
    const path = join(folder, 'short.safetensors')
    writeFileSync(path, Buffer.alloc(bytes))
    expect(() => openSafetensors(path)).toThrow(/at least 8 bytes/)
  })

  it('survives cutting at any byte with a typed error', async () => {
    const path = join(folder, 'cut.safetensors')
    await writeSafetensors(path, [{ name: 'x', dtype: 'F32', shape: [3], data: Float32Array.of(1, 2, 3) }])
    const bytes = readFileSync(path)
    for (let length = 0; length < bytes.length; length++) {
      writeFileSync(path, bytes.subarray(0, length))
      expect(() => openSafetensors(path), `${length} bytes`).toThrow(code('ERR_CHECKPOINT'))
    }
  })
})

describe('sharded weights', () => {
  const index = (map: unknown): void =>
    writeFileSync(join(folder, 'model.safetensors.index.json'), JSON.stringify({ weight_map: map }))
  const shard = (file: string, ...names: string[]): Promise<void> =>
    writeSafetensors(
      join(folder, file),
      names.map((name, i) => ({ name, dtype: 'F32', shape: [1], data: Float32Array.of(i + 1) })),
    )

  it('merge into one set of entries that know their files', async () => {
    await shard('one.safetensors', 'a', 'b')
    await shard('two.safetensors', 'c')
    index({ a: 'one.safetensors', b: 'one.safetensors', c: 'two.safetensors' })
    const weights = openWeights(folder)
    expect([...weights.entries.keys()]).toEqual(['a', 'b', 'c'])
    expect(weights.entries.get('c')?.file).toBe(join(folder, 'two.safetensors'))
    expect(weights.readFloats('b')[0]).toBe(2)
    expect(openWeights(join(folder, 'two.safetensors')).readFloats('c')[0]).toBe(1)
  })

  it.each([
    ['a missing shard', { a: 'three.safetensors' }, 'ERR_CHECKPOINT', /three/],
    ['a tensor that its shard lacks', { z: 'one.safetensors' }, 'ERR_CHECKPOINT', /'z'/],
    ['a shard in another folder', { a: '../one.safetensors' }, 'ERR_CHECKPOINT', /without folders/],
    ['a shard that is no name', { a: 1 }, 'ERR_CHECKPOINT', /without folders/],
    ['no map', undefined, 'ERR_CHECKPOINT', /weight_map/],
  ])('with %s are refused', async (_what, map, expected, message) => {
    await shard('one.safetensors', 'a')
    index(map)
    const path = join(folder, 'model.safetensors.index.json')
    expect(() => openWeights(path)).toThrow(code(expected))
    expect(() => openWeights(path)).toThrow(message)
  })
})

describe('writing', () => {
  const good: TensorToWrite = { name: 'x', dtype: 'F32', shape: [2], data: Float32Array.of(1, 2) }
  const target = (): string => join(folder, 'out.safetensors')

  it.each([
    ['data of another size', [{ ...good, shape: [3] }], 'ERR_CHECKPOINT'],
    ['elements of another size', [{ ...good, data: Uint16Array.of(1, 2, 3, 4) }], 'ERR_CHECKPOINT'],
    ['a repeated name', [good, good], 'ERR_CHECKPOINT'],
    [
      'late data of another size',
      [good, { ...good, name: 'y', data: () => new Float32Array(3) }],
      'ERR_CHECKPOINT',
    ],
    [
      'late data that fails',
      [good, { ...good, name: 'y', data: () => Promise.reject(new Error('device lost')) }],
      'ERR_IO',
    ],
  ] as [string, TensorToWrite[], string][])('%s leaves nothing behind', async (_what, tensors, expected) => {
    await expect(writeSafetensors(target(), tensors)).rejects.toThrow(code(expected))
    expect(readdirSync(folder)).toEqual([])
  })

  it('keeps the existing file when the disk is full', async () => {
    await writeSafetensors(target(), [good])
    const before = readFileSync(target())
    const probe = await open(target(), 'r')
    const prototype = Object.getPrototypeOf(probe) as FileHandle
    await probe.close()
    const full = Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' })
    vi.spyOn(prototype, 'write').mockRejectedValue(full)
    const failing = writeSafetensors(target(), [{ ...good, data: Float32Array.of(8, 9) }])
    await expect(failing).rejects.toThrow(code('ERR_IO'))
    await expect(failing).rejects.toThrow(/ENOSPC.*space/s)
    vi.restoreAllMocks()
    expect(readdirSync(folder)).toEqual(['out.safetensors'])
    expect(readFileSync(target())).toEqual(before)
  })

  it('keeps the existing file when aborted midway', async () => {
    await writeSafetensors(target(), [good])
    const before = readFileSync(target())
    const controller = new AbortController()
    const late = {
      ...good,
      name: 'y',
      data: () => {
        controller.abort()
        return new Float32Array(2)
      },
    }
    const aborted = writeSafetensors(target(), [good, late], undefined, { signal: controller.signal })
    await expect(aborted).rejects.toThrow(code('ERR_ABORTED'))
    expect(readdirSync(folder)).toEqual(['out.safetensors'])
    expect(readFileSync(target())).toEqual(before)
  })

  it('refuses a target that is a folder or lies below a file', async () => {
    mkdirSync(target())
    await expect(writeSafetensors(target(), [good])).rejects.toThrow(code('ERR_IO'))
    writeFileSync(join(folder, 'file'), '')
    await expect(writeSafetensors(join(folder, 'file', 'x'), [good])).rejects.toThrow(code('ERR_IO'))
    expect(readdirSync(folder).sort()).toEqual(['file', 'out.safetensors'])
  })

  it('continues short writes instead of accepting them', async () => {
    const probe = await open(join(folder, 'probe'), 'w')
    const prototype = Object.getPrototypeOf(probe) as FileHandle
    await probe.close()
    const write = prototype.write as (
      this: FileHandle,
      b: Uint8Array,
      o: number,
      n: number,
    ) => Promise<unknown>
    vi.spyOn(prototype, 'write').mockImplementation(function (
      this: FileHandle,
      b: unknown,
      o: unknown,
      n: unknown,
    ) {
      return write.call(this, b as Uint8Array, o as number, Math.min(n as number, 3)) as never
    })
    await writeFileAtomic(join(folder, 'text'), 'twelve bytes')
    expect(readFileSync(join(folder, 'text'), 'utf8')).toBe('twelve bytes')
  })
})

describe('a model folder', () => {
  it('comes back as it was written', async () => {
    const model = join(folder, 'new', 'model')
    const config = { _class_name: 'Test', layers: 3 }
    await writePretrained(model, config, [{ name: 'x', dtype: 'U8', shape: [1], data: Uint8Array.of(4) }])
    expect(readConfig(model)).toEqual(config)
    expect(findWeights(model)).toEqual({
      path: join(model, 'diffusion_pytorch_model.safetensors'),
      sharded: false,
    })
    expect(openWeights(model).readArray('x')).toEqual(Uint8Array.of(4))
    expect(openWeights(model).metadata).toEqual({ format: 'pt' })
  })

  it('without a readable config is refused', () => {
    expect(() => readConfig(folder)).toThrow(code('ERR_IO'))
    writeFileSync(join(folder, 'config.json'), '{')
    expect(() => readConfig(folder)).toThrow(code('ERR_CHECKPOINT'))
    writeFileSync(join(folder, 'config.json'), '[]')
    expect(() => readConfig(folder)).toThrow(/JSON object/)
  })

  it('with pickled weights is refused with a way to convert them', () => {
    writeFileSync(join(folder, 'diffusion_pytorch_model.bin'), '')
    expect(() => findWeights(folder)).toThrow(/pickle.*'diffusion_pytorch_model\.safetensors'/s)
  })

  it('prefers the published names and refuses a choice between others', () => {
    expect(() => findWeights(folder)).toThrow(/no safetensors file/)
    writeFileSync(join(folder, 'b.safetensors'), '')
    expect(findWeights(folder).path).toBe(join(folder, 'b.safetensors'))
    writeFileSync(join(folder, 'a.safetensors'), '')
    expect(() => findWeights(folder)).toThrow(/a\.safetensors, b\.safetensors/)
    writeFileSync(join(folder, 'model.safetensors.index.json'), '{}')
    expect(findWeights(folder)).toMatchObject({ sharded: true })
    writeFileSync(join(folder, 'model.safetensors'), '')
    expect(findWeights(folder)).toMatchObject({ sharded: false })
    expect(() => findWeights(join(folder, 'model.safetensors'))).toThrow(/a file/)
  })
})
