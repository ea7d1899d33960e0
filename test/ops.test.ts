import { describe, expect, it } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { adamwStep } from '../lib/ops/adamw.ts'
import { attention } from '../lib/ops/attention.ts'
import { cast } from '../lib/ops/cast.ts'
import { conv3d } from '../lib/ops/conv3d.ts'
import { chunk, concat, permute, reshape, slice } from '../lib/ops/copy.ts'
import { downsample } from '../lib/ops/downsample.ts'
import { embedding } from '../lib/ops/embedding.ts'
import { euler } from '../lib/ops/euler.ts'
import { framesDecode, framesEncode } from '../lib/ops/frames.ts'
import { gradNorm } from '../lib/ops/grad-norm.ts'
import { groupNorm } from '../lib/ops/group-norm.ts'
import { linear, matmul, packWeight } from '../lib/ops/matmul.ts'
import { mix } from '../lib/ops/mix.ts'
import { mse } from '../lib/ops/mse.ts'
import { normModulate, rmsNorm } from '../lib/ops/norm.ts'
import { packTokens, unpatchify } from '../lib/ops/patchify.ts'
import { add, clamp, div, gatedAdd, mul, scale, silu } from '../lib/ops/pointwise.ts'
import { mean, sum } from '../lib/ops/reduce.ts'
import { blockNoise, renoise } from '../lib/ops/renoise.ts'
import { rope } from '../lib/ops/rope.ts'
import { upsample } from '../lib/ops/upsample.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { child, numbers, random, worst } from './gradcheck.ts'

const values = async (t: Tensor) => [...(await t.read())]
const ints = (list: number[], shape = [list.length]) => Tensor.from(Int32Array.from(list), shape)
const range = (n: number) => Array.from({ length: n }, (_, i) => i)

describe('ops compute what their equations say', () => {
  it('moves: reshape, slice, chunk, concat, permute, cast', async () => {
    const x = Tensor.from(range(12), [2, 2, 3])
    expect(reshape(x, [3, -1]).shape).toEqual([3, 4])
    expect(await values(slice(x, 1, 1, 1))).toEqual([3, 4, 5, 9, 10, 11])
    expect(await values(slice(x, 0, 1, 1))).toEqual([6, 7, 8, 9, 10, 11])
    expect(await values(slice(x, -1, 0, 2))).toEqual([0, 1, 3, 4, 6, 7, 9, 10])
    const parts = chunk(x, 2, 2)
    expect(parts.map((t) => t.shape[2])).toEqual([2, 1])
    expect(await values(concat([parts[1] as Tensor, parts[0] as Tensor], 2))).toEqual([
      2, 0, 1, 5, 3, 4, 8, 6, 7, 11, 9, 10,
    ])
    expect(await values(permute(x, [2, 0, 1]))).toEqual([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])
    expect(await values(permute(cast(x, 'i32'), [1, 0, 2]))).toEqual([0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11])
    expect(cast(x, 'f32')).toBe(x)
    expect(await values(cast(Tensor.from([1.003, -2.5, 300]), 'bf16'))).toEqual([1, -2.5, 300])
    expect(await values(cast(Tensor.from([-3, 7.9, 300]), 'u8'))).toEqual([0, 7, 255])
  })

  it('arithmetic with broadcasting, sums and means', async () => {
    const x = Tensor.from(range(6), [2, 3])
    expect(await values(add(x, Tensor.from([10, 20], [2, 1])))).toEqual([10, 11, 12, 23, 24, 25])
    expect(await values(mul(x, x))).toEqual([0, 1, 4, 9, 16, 25])
    expect(await values(div(x, Tensor.from([2])))).toEqual([0, 0.5, 1, 1.5, 2, 2.5])
    expect(await values(scale(x, 2, 1))).toEqual([1, 3, 5, 7, 9, 11])
    expect(await values(clamp(x, 1, 3))).toEqual([1, 1, 2, 3, 3, 3])
    expect(await values(sum(x))).toEqual([15])
    expect(await values(sum(x, 0))).toEqual([3, 5, 7])
    expect(await values(mean(x, 1))).toEqual([1, 4])
    const gate = Tensor.from([1, 1, 1, 2, 2, 2], [2, 3])
    expect(await values(gatedAdd(x, x, gate, ints([1, 0])))).toEqual([0, 3, 6, 6, 8, 10])
  })

  it('products: linear, matmul, conv3d', async () => {
    const x = Tensor.from([1, 2, 3, 4], [2, 2])
    const w = Tensor.from([1, 0, 0, 1, 1, 1], [3, 2])
    const bias = Tensor.from([0, 0, 10])
    expect(await values(linear(x, w, bias, { residual: Tensor.full([2, 3], 100) }))).toEqual([
      101, 102, 113, 103, 104, 117,
    ])
    expect(await values(matmul(x, x, { transA: true }))).toEqual([10, 14, 14, 20])
    const clip = Tensor.from(range(8), [1, 2, 2, 2, 1])
    const kernel = Tensor.from([1, 10], [1, 1, 2, 1, 1])
    // One frame of zeros in front: y_t = x_{t−1} + 10·x_t.
    expect(await values(conv3d(clip, kernel, null, { pad: [1, 0, 0] }))).toEqual([
      0, 10, 20, 30, 40, 51, 62, 73,
    ])
  })

  it('the packed form of a weight gives the unpacked result', async () => {
    const [x, w, bias, residual] = [random([9, 33]), random([18, 33]), random([18]), random([9, 18])]
    const plain = await linear(x, w, bias, { activation: 'silu', residual }).floats()
    packWeight(w)
    expect(w.packed === null).toBe(engine.packBytes(18, 33, 'f32') === 0)
    const packed = await linear(x, w, bias, { activation: 'silu', residual }).floats()
    expect(worst(packed, plain)).toBeLessThan(1e-5)
    w.dispose()
  })

  it.each(['plain', 'packed'])(
    'a product with a %s weight goes into part of a wider tensor',
    async (form) => {
      const [x, w, bias] = [random([9, 33]), random([18, 33]), random([18])]
      if (form === 'packed') packWeight(w)
      const into = Tensor.full([9, 25], 7)
      const alone = await linear(x, w, bias, { activation: 'geluTanh' }).floats()
      expect(linear(x, w, bias, { activation: 'geluTanh', into, column: 4 })).toBe(into)
      const wide = await into.floats()
      const inside = (i: number): boolean => i % 25 >= 4 && i % 25 < 22
      expect(wide.filter((_, i) => inside(i))).toEqual(alone)
      expect(wide.filter((v, i) => !inside(i) && v !== 7)).toHaveLength(0)
      w.dispose()
    },
  )

  it('attention normalises and rotates queries and keys as rope does before it', async () => {
    const [length, heads, d, split] = [7, 2, 6, 3]
    const shape = [1, length, heads, d]
    const [q, k, v] = [random(shape), random(shape), random(shape)]
    const [weightQ, weightK] = [random([2, d]), random([2, d])]
    const [cos, sin] = [random([length, d / 2]), random([length, d / 2])]
    const fused = attention(q, k, v, { norm: { weightQ, weightK, cos, sin, eps: 1e-3, split } })
    const turned = (x: Tensor, weight: Tensor): Tensor => {
      const part = (row: number, start: number, count: number): Tensor =>
        rope(slice(x, 1, start, count), {
          weight: reshape(slice(weight, 0, row, 1), [d]),
          cos: slice(cos, 0, start, count),
          sin: slice(sin, 0, start, count),
          eps: 1e-3,
        })
      return concat([part(0, 0, split), part(1, split, length - split)], 1)
    }
    const apart = attention(turned(q, weightQ), turned(k, weightK), v)
    expect(worst(await fused.floats(), await apart.floats())).toBeLessThan(1e-5)
  })

  it('attention sees equal segments of lower order only', async () => {
    const [length, d] = [5, 4]
    const [q, k, v] = [0, 1, 2].map(() => random([1, length, 1, d])) as [Tensor, Tensor, Tensor]
    const [segment, order] = [
      [0, 0, 1, 1, 0],
      [0, 1, 0, 1, 0],
    ] as [number[], number[]]
    const y = await attention(q, k, v, {
      segment: ints(segment, [1, 5]),
      order: ints(order, [1, 5]),
    }).floats()
    const [a, b, c] = await Promise.all([q, k, v].map((t) => t.floats()))
    const expected: number[] = []
    for (let i = 0; i < length; i++) {
      const weights = range(length).map((j) => {
        const visible = segment[i] === segment[j] && order[i]! >= order[j]!
        return visible ? Math.exp(range(d).reduce((s, e) => s + a![i * d + e]! * b![j * d + e]!, 0) / 2) : 0
      })
      const total = weights.reduce((s, w) => s + w, 0)
      for (let e = 0; e < d; e++)
        expected.push(weights.reduce((s, w, j) => s + w * c![j * d + e]!, 0) / total)
    }
    expect(worst(y, expected)).toBeLessThan(1e-5)
  })

  it('norms, rotation and embedding', async () => {
    const x = Tensor.from([1, 3, -2, 2], [2, 2])
    const table = Tensor.from([0, 0, 1, 1], [2, 2])
    const y = await normModulate(x, { scale: table, shift: table, rows: ints([1, 0]) }).floats()
    expect(worst(y, [-1, 3, -1, 1])).toBeLessThan(1e-5)
    expect(
      worst(
        await rmsNorm(x, Tensor.from([1, 2])).floats(),
        [1, 6, -2, 4].map((n, i) => n / Math.sqrt(i < 2 ? 5 : 4)),
      ),
    ).toBeLessThan(1e-5)
    const g = await groupNorm(
      Tensor.from([1, 5, 3, 9], [1, 2, 2]),
      Tensor.full([2], 1),
      Tensor.full([2], 0),
      { groups: 2 },
    ).floats()
    expect(worst(g, [-1, -1, 1, 1])).toBeLessThan(1e-5)
    const turned = rope(Tensor.from([1, 2], [1, 1, 2]), {
      cos: Tensor.full([1, 1], 0),
      sin: Tensor.full([1, 1], 1),
    })
    expect(await values(turned)).toEqual([-2, 1])
    expect(await values(embedding(x, ints([1, 1, 0])))).toEqual([-2, 2, -2, 2, 1, 3])
  })

  it('resizing, mixing, stepping and patching', async () => {
    const x = Tensor.from(range(16), [1, 4, 4])
    expect(await values(downsample(x, 2))).toEqual([5, 9, 21, 25])
    expect(await values(upsample(Tensor.from([1, 2], [1, 2])))).toEqual([1, 1, 2, 2, 1, 1, 2, 2])
    const [a, b] = [Tensor.from([1, 2], [2, 1]), Tensor.from([5, 6], [2, 1])]
    expect(await values(mix(a, b, Tensor.from([1, 0.25])))).toEqual([1, 5])
    expect(await values(euler(a, b, a, { deltaSigma: -0.5, guidance: 2 }))).toEqual([-3.5, -3])
    const clip = Tensor.from(range(16), [1, 2, 1, 2, 4])
    const layout = { latentTokens: 2, columns: [{ clips: [{ rowOffset: 0, rowStride: 2 }] }] }
    const tokens = packTokens([[clip]], layout)
    expect(await values(tokens)).toEqual([0, 8, 1, 9, 4, 12, 5, 13, 2, 10, 3, 11, 6, 14, 7, 15])
    expect(await values(unpatchify(tokens, { rowOffset: 0, rowStride: 2, shape: clip.shape }))).toEqual(
      range(16),
    )
  })

  it('frames, loss, gradient norm and AdamW', async () => {
    const bytes = Tensor.from(Uint8Array.from(range(24).map((i) => i * 11)), [1, 2, 2, 2, 3])
    const video = framesDecode(bytes)
    expect((await video.floats())[1]).toBeCloseTo(33 / 127.5 - 1, 6)
    // Half a step up, because encoding truncates and f32 may have rounded down.
    expect(await values(framesEncode(scale(video, 1, 0.5 / 127.5)))).toEqual(await values(bytes))
    const extremes = Tensor.from([-2, 2, Number.NaN], [1, 3, 1, 1, 1])
    expect(await values(framesEncode(extremes))).toEqual([0, 255, 0])
    expect(await values(mse(Tensor.from([1, 2, 3, 4], [2, 2]), Tensor.zeros([2, 2])))).toEqual([2.5, 12.5])

    const grad = Tensor.from([3, 4])
    const clip = gradNorm(grad, 1)
    expect(worst(await clip.floats(), [5, 0.2])).toBeLessThan(1e-5)
    const [param, m, v] = [Tensor.from([1, -1]), Tensor.zeros([2]), Tensor.zeros([2])]
    const shadow = Tensor.zeros([2], 'bf16')
    const settings = { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weightDecay: 0.5 }
    adamwStep({ grad, clip, param, m, v, shadow, ...settings, biasCorrection1: 0.1, biasCorrection2: 0.01 })
    // The first step is lr·sign(g) after the decay of lr·wd.
    expect(worst(await param.floats(), [0.85, -1.05])).toBeLessThan(1e-5)
    expect(worst(await shadow.floats(), [0.85, -1.05])).toBeLessThan(5e-3)
    expect(worst(await m.floats(), [0.06, 0.08])).toBeLessThan(1e-5)
    const broken = gradNorm(Tensor.from([Number.NaN, 1]), 1)
    adamwStep({ grad, clip: broken, param, m, v, ...settings, biasCorrection1: 0.1, biasCorrection2: 0.01 })
    expect(worst(await param.floats(), [0.85, -1.05])).toBeLessThan(1e-5)
  })

  it('bf16 results stay close to f32 ones', async () => {
    const [x, w] = [random([7, 40]), random([11, 40])]
    const exact = await silu(linear(x, w)).floats()
    const rounded = silu(linear(cast(x, 'bf16'), cast(w, 'bf16')))
    expect(rounded.dtype).toBe('bf16')
    expect(worst(await rounded.floats(), exact)).toBeLessThan(0.02)
  })
})

describe('ops refuse what does not fit, naming it', () => {
  const t = (...shape: number[]) => Tensor.zeros(shape)
  const cases: [string, () => unknown, RegExp][] = [
    ['add', () => add(t(2, 3), t(2)), /add: expected b that broadcasts to a \[2, 3\], received \[2\]/],
    ['silu', () => silu(ints([1])), /silu: expected f32 or bf16, received i32/],
    [
      'gatedAdd',
      () => gatedAdd(t(2, 3), t(2, 3), t(1, 4), ints([0, 0])),
      /gate \[R, d\] of \[any, 3\], received \[1, 4\]/,
    ],
    ['slice', () => slice(t(2, 3), 1, 2, 2), /3 steps of axis 1/],
    ['concat', () => concat([t(2, 3), t(3, 3)], 1), /received \[3, 3\]/],
    ['reshape', () => reshape(t(2, 3), [4, -1]), /6 elements/],
    ['permute', () => permute(t(2, 3), [0, 0]), /each named once/],
    ['linear', () => linear(t(2, 3), t(4, 5)), /weight \[N, K\] of \[any, 3\], received \[4, 5\]/],
    [
      'activation',
      () => linear(t(2, 3), t(4, 3), null, { activation: 'gelu' as never }),
      /silu, received gelu/,
    ],
    [
      'linear into',
      () => linear(t(2, 3), t(4, 3), null, { into: t(2, 5), column: 2 }),
      /4 columns of into from 2 on, received \[2, 5\]/,
    ],
    ['linear dtype', () => linear(t(2, 3), Tensor.zeros([4, 3], 'bf16')), /weight of f32/],
    ['matmul', () => matmul(t(2, 3), t(2, 3)), /b \[..., K, N\]/],
    ['conv3d', () => conv3d(t(1, 1, 3, 3, 2), t(4, 2, 3, 3, 3)), /as large as the kernel/],
    [
      'attention',
      () => attention(t(1, 8, 2, 64), t(1, 8, 2, 32), t(1, 8, 2, 32)),
      /k \[B, Lk, H, D\].*received \[1, 8, 2, 32\]/,
    ],
    [
      'attention masks',
      () => attention(t(1, 2, 1, 4), t(1, 2, 1, 4), t(1, 2, 1, 4), { segment: ints([0, 0], [1, 2]) }),
      /together/,
    ],
    [
      'attention norm',
      () => attention(t(1, 2, 1, 4), t(1, 2, 1, 4), t(1, 2, 1, 4), { norm: { weightQ: t(3, 4) } }),
      /weightQ \[2, D\]/,
    ],
    [
      'attention norm beside a gradient',
      () => {
        const q = t(1, 2, 1, 4)
        q.requiresGrad = true
        return attention(q, t(1, 2, 1, 4), t(1, 2, 1, 4), { norm: {} })
      },
      /keeps nothing for backward/,
    ],
    ['normModulate', () => normModulate(t(2, 4), { scale: t(3, 4) }), /i32 \[2\] for 3 entries/],
    ['groupNorm', () => groupNorm(t(1, 2, 6), t(6), t(6), { groups: 4 }), /divisor of 6/],
    ['rope', () => rope(t(2, 1, 4), { cos: t(2, 2) }), /cos and sin together/],
    ['packTokens', () => packTokens([], { latentTokens: 1, columns: [] }), /clips per column/],
    ['blockNoise', () => blockNoise([3, 4], { gamma: 0, seed: 1, stream: 1 }), /even/],
    ['mse', () => mse(t(2, 3), t(2, 4)), /target as pred/],
    ['framesEncode', () => framesEncode(t(1, 4, 1, 2, 2)), /\[B, 3, T, H, W\]/],
  ]
  for (const [name, call, message] of cases) it(name, () => expect(call).toThrow(message))
})

describe('random numbers', () => {
  it('of a generator repeat for a seed, differ by name and by call, and can be resumed', async () => {
    const [a, b] = [new Generator(42), new Generator(42n)]
    const first = await values(a.normal([5]))
    expect(await values(b.normal([5]))).toEqual(first)
    expect(await values(a.normal([5]))).not.toEqual(first)
    expect(await values(new Generator(43).normal([5]))).not.toEqual(first)
    const named = async (...names: (string | number)[]) =>
      (await values(b.stream(...names).normal([2]))).join()
    const streams = await Promise.all([
      named('ab'),
      named('a', 'b'),
      named('a', 1),
      named('a', '1'),
      named(1, 'a'),
    ])
    expect(new Set(streams).size).toBe(5)
    // A child does not depend on what its parent drew before.
    expect(await named('ab')).toBe(streams[0])
    const state = JSON.parse(JSON.stringify(a.state()))
    const next = await values(a.uniform([3]))
    expect(await values(new Generator(0).restore(state).uniform([3]))).toEqual(next)
    expect(() => new Generator(0.5)).toThrow(/whole number/)
    expect(() => a.restore({} as never)).toThrow(/state\(\)/)
  })

  it('computed on the host equal the native ones', async () => {
    for (const seed of [0, 1, 0xffffffff, 2n ** 63n + 12345n]) {
      const [a, b] = [new Generator(seed).stream('x'), new Generator(seed).stream('x')]
      for (const n of [1, 4, 1001]) expect(await values(a.uniform([n]))).toEqual(b.hostUniform(n))
    }
  })

  it('have the moments they should have', async () => {
    const z = await new Generator(3).normal([100_001], { mean: 2, std: 3 }).floats()
    const average = z.reduce((s, v) => s + v, 0) / z.length
    expect(average).toBeCloseTo(2, 1)
    expect(z.reduce((s, v) => s + (v - average) ** 2, 0) / z.length).toBeCloseTo(9, 0)
    const u = await new Generator(3).uniform([1000], { low: -2, high: -1 }).floats()
    expect(u.every((v) => v >= -2 && v < -1)).toBe(true)
  })

  it('of a block sum to nothing at gamma = 1/3, and are plain normals at 0', async () => {
    const stream = { seed: 5, stream: 6n }
    const n = await blockNoise([2, 4, 6], { gamma: 1 / 3, ...stream }).floats()
    for (let f = 0; f < 2; f++) {
      for (let y = 0; y < 4; y += 2) {
        for (let x = 0; x < 6; x += 2) {
          const at = f * 24 + y * 6 + x
          expect(Math.abs(n[at]! + n[at + 1]! + n[at + 6]! + n[at + 7]!)).toBeLessThan(1e-5)
        }
      }
    }
    const x = Tensor.from(numbers(12), [2, 2, 3])
    const jumped = await renoise(x, { alpha: 2, beta: 0.5, gamma: 1 / 3, ...stream }).floats()
    const up = await upsample(x).floats()
    expect(
      worst(
        jumped,
        up.map((v, i) => 2 * v + 0.5 * n[i]!),
      ),
    ).toBeLessThan(1e-6)
  })

  it('and renoising have the same bits for one thread and for two', async () => {
    const source = `
      const { Tensor } = await import('./lib/tensor/tensor.ts')
      const { renoise } = await import('./lib/ops/renoise.ts')
      const { randomNormal } = await import('./lib/ops/random.ts')
      const { createHash } = await import('node:crypto')
      const { engine } = await import('./lib/engine/engine.ts')
      const x = randomNormal([48, 31, 37], { seed: 1, stream: 2 })
      const y = renoise(x, { alpha: 0.5, beta: 0.7, gamma: 1 / 3, seed: 7, stream: 2n ** 60n })
      console.log(engine.device.threads, createHash('sha256').update(await y.floats()).digest('hex'))`
    const runs = await Promise.all(['1', '2'].map((threads) => child(source, { PYRAFLOW_THREADS: threads })))
    const [one, two] = runs.map(({ output }) => output.split(' '))
    expect([one?.[0], two?.[0]]).toEqual(['1', '2'])
    expect(one?.[1]).toBe(two?.[1])
  })
})
