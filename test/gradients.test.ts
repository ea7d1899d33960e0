import { describe, expect, it } from 'vitest'
import { attention } from '../lib/ops/attention.ts'
import { cast } from '../lib/ops/cast.ts'
import { conv3d } from '../lib/ops/conv3d.ts'
import { chunk, concat, permute, reshape, slice } from '../lib/ops/copy.ts'
import { downsample } from '../lib/ops/downsample.ts'
import { embedding } from '../lib/ops/embedding.ts'
import { euler } from '../lib/ops/euler.ts'
import { groupNorm } from '../lib/ops/group-norm.ts'
import { linear, matmul } from '../lib/ops/matmul.ts'
import { mix } from '../lib/ops/mix.ts'
import { mse } from '../lib/ops/mse.ts'
import { layerNorm, normModulate, rmsNorm } from '../lib/ops/norm.ts'
import { packTokens, unpatchify } from '../lib/ops/patchify.ts'
import * as pointwise from '../lib/ops/pointwise.ts'
import { mean, sum } from '../lib/ops/reduce.ts'
import { renoise } from '../lib/ops/renoise.ts'
import { rope } from '../lib/ops/rope.ts'
import { upsample } from '../lib/ops/upsample.ts'
import { keep, scope } from '../lib/tensor/scope.ts'
import { backward, checkpoint, noGrad } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { gradcheck, live, numbers, random, worst } from './gradcheck.ts'

// Thousands of tiny ops: a team of threads would only wait for each other.
process.env.PYRAFLOW_THREADS ??= '1'

const { add, axpby, clamp, div, exp, gatedAdd, gelu, geluTanh, mul, quickGelu, relu } = pointwise
const { scale, sigmoid, silu, sqrt, square, sub, tanh } = pointwise
const ints = (values: number[], shape = [values.length]) => Tensor.from(Int32Array.from(values), shape)

describe('pointwise ops differentiate', () => {
  for (const [name, fn] of Object.entries({ silu, gelu, geluTanh, exp, square, sigmoid, tanh, quickGelu })) {
    it(name, () => gradcheck(fn, [random([3, 7], { scale: 2 })]))
  }
  it('sqrt', () => gradcheck(sqrt, [random([17], { offset: 2 })]))
  it('relu and clamp, away from their corners', async () => {
    const x = Tensor.from(numbers(19).map((v) => v + Math.sign(v) * 0.2))
    await gradcheck(relu, [x])
    await gradcheck((t) => clamp(t, -0.7, 0.6), [Tensor.from([-2, -0.9, -0.4, 0.1, 0.4, 0.8, 3])])
  })

  const pairs: [number[], number[]][] = [
    [
      [2, 3, 5],
      [2, 3, 5],
    ],
    [[2, 3, 5], [5]],
    [
      [2, 3, 5],
      [3, 1],
    ],
    [
      [2, 3, 5],
      [2, 1, 5],
    ],
    [
      [2, 3, 2, 3],
      [2, 1, 2, 1],
    ],
    [[2, 3, 5], [1]],
    [[1, 4], [1, 1, 4].slice(1)],
  ]
  for (const [a, b] of pairs) {
    it(`add, sub, mul and div of [${a}] and [${b}]`, async () => {
      for (const fn of [add, sub, mul, div]) await gradcheck(fn, [random(a), random(b, { offset: 2.5 })])
    })
  }
  it('scale and axpby', async () => {
    await gradcheck((x) => scale(x, -1.5, 0.25), [random([9])])
    await gradcheck((x, y) => axpby(x, y, 0.5, -2), [random([3, 3]), random([3, 3])])
  })
  it('gatedAdd', () =>
    gradcheck(
      (x, y, gate) => gatedAdd(x, y, gate, ints([1, 0, 2, 1, 1])),
      [random([5, 7]), random([5, 7]), random([3, 7])],
    ))
})

describe('moves and reductions differentiate', () => {
  it('reshape, permute and cast', async () => {
    await gradcheck((x) => square(reshape(x, [5, -1])), [random([3, 5, 2])])
    await gradcheck((x) => square(permute(x, [2, 0, 3, 1])), [random([2, 3, 2, 3])])
    // The cast to bf16 itself has no small differences; its gradient is the one of the values around it.
    const x = Tensor.from([1, 2, 3])
    x.requiresGrad = true
    scope(() => backward(sum(square(cast(x, 'bf16')))))
    expect([...(await (x.grad as Tensor).floats())]).toEqual([2, 4, 6])
  })
  it('slice, chunk and concat along every axis', async () => {
    for (const axis of [0, 1, 2]) {
      await gradcheck((x) => square(slice(x, axis, 1, 2)), [random([3, 4, 3])])
      await gradcheck(
        (x) => {
          const [a, b] = chunk(x, axis, 2) as [Tensor, Tensor]
          return concat([square(b), a, scale(b, 3)], axis)
        },
        [random([3, 4, 3])],
      )
      await gradcheck((x) => square(chunk(x, axis, 3)[1] as Tensor), [random([3, 4, 3])])
    }
  })
  it('sum and mean, over all and over an axis', async () => {
    for (const axis of [undefined, 0, 1, -1]) {
      await gradcheck((x) => sum(square(x), axis), [random([3, 4, 5])])
      await gradcheck((x) => mean(square(x), axis), [random([3, 4, 5])])
    }
  })
})

describe('products differentiate', () => {
  it('linear, with bias, activation and residual', async () => {
    const parts = () => [random([2, 3, 5]), random([7, 5]), random([7]), random([2, 3, 7])]
    await gradcheck((x, w) => linear(x, w), parts().slice(0, 2))
    await gradcheck((x, w, b) => linear(x, w, b), parts().slice(0, 3))
    for (const activation of ['none', 'geluTanh', 'silu'] as const) {
      await gradcheck((x, w, b, residual) => linear(x, w, b, { activation, residual }), parts())
    }
  })
  it('matmul in all four layouts, batched, shared and plain', async () => {
    for (const transA of [false, true]) {
      for (const transB of [false, true]) {
        for (const [lead, leadB] of [
          [[], []],
          [[2], [2]],
          [[2], []],
          [
            [2, 2],
            [2, 2],
          ],
        ] as number[][][]) {
          const a = random([...(lead as number[]), ...(transA ? [4, 3] : [3, 4])])
          const b = random([...(leadB as number[]), ...(transB ? [5, 4] : [4, 5])])
          await gradcheck((x, y) => matmul(x, y, { transA, transB }), [a, b])
        }
      }
    }
  })
  it('conv3d, with padding, strides and bias', async () => {
    const x = () => random([2, 3, 4, 3, 2])
    const w = () => random([3, 2, 3, 3, 3], { scale: 0.5 })
    await gradcheck((a, b, c) => conv3d(a, b, c, { pad: [2, 1, 1] }), [x(), w(), random([3])])
    await gradcheck((a, b) => conv3d(a, b, null, { stride: [1, 2, 2], pad: [2, 1, 1] }), [x(), w()])
    await gradcheck(
      (a, b, c) => conv3d(a, b, c, { stride: [2, 1, 1], pad: [2, 1, 1] }),
      [x(), w(), random([3])],
    )
    await gradcheck((a, b, c) => conv3d(a, b, c), [x(), random([3, 2, 1, 1, 1]), random([3])])
  })
  it('embedding, with repeated indices', () =>
    gradcheck((table) => embedding(table, ints([3, 0, 3, 1])), [random([4, 5])]))
})

describe('attention differentiates', () => {
  it('without a mask, also with keys of another length', async () => {
    await gradcheck(
      (q, k, v) => attention(q, k, v),
      [random([2, 5, 2, 4]), random([2, 5, 2, 4]), random([2, 5, 2, 4])],
    )
    await gradcheck(
      (q, k, v) => attention(q, k, v),
      [random([1, 3, 2, 8]), random([1, 5, 2, 8]), random([1, 5, 2, 8])],
    )
  })
  it('with segments and orders, and with a row that sees nothing but itself', () => {
    const segment = ints([0, 0, 1, 0, 1, 2], [1, 6])
    const order = ints([0, 1, 0, 1, 2, 0], [1, 6])
    const shape = [1, 6, 2, 4]
    return gradcheck(
      (q, k, v) => attention(q, k, v, { segment, order, scale: 0.7 }),
      [random(shape), random(shape), random(shape)],
    )
  })
})

describe('norms and rotations differentiate', () => {
  it('normModulate with rows, with one of its tables, and plain', async () => {
    const rows = ints([0, 1, 1, 0])
    await gradcheck(
      (x, shift, s) => normModulate(x, { shift, scale: s, rows }),
      [random([4, 7], { scale: 2 }), random([2, 7]), random([2, 7])],
    )
    await gradcheck((x, s) => normModulate(x, { scale: s, rows }), [random([4, 7]), random([2, 7])])
    await gradcheck((x, shift) => normModulate(x, { shift, rows }), [random([4, 7]), random([2, 7])])
    await gradcheck((x) => layerNorm(x), [random([2, 3, 9])])
  })
  it('rmsNorm', () => gradcheck((x, w) => rmsNorm(x, w), [random([3, 9], { offset: 0.5 }), random([9])]))
  it('groupNorm, with and without silu', async () => {
    for (const withSilu of [false, true]) {
      await gradcheck(
        (x, w, b) => groupNorm(x, w, b, { groups: 2, silu: withSilu }),
        [random([2, 5, 6]), random([6]), random([6])],
      )
    }
  })
  it('rope with weight and rotation, and with either alone', async () => {
    const angles = numbers(3 * 4, 5).map((a) => 3 * a)
    const [cos, sin] = [Math.cos, Math.sin].map((f) => Tensor.from(angles.map(f), [3, 4])) as [Tensor, Tensor]
    const x = () => random([3, 2, 8], { offset: 0.3 })
    await gradcheck((t, weight) => rope(t, { weight, cos, sin }), [x(), random([8])])
    await gradcheck((t, weight) => rope(t, { weight }), [x(), random([8])])
    await gradcheck((t) => rope(t, { cos, sin }), [x()])
  })
})

describe('image and token ops differentiate', () => {
  it('downsample and upsample, also of odd sizes', async () => {
    await gradcheck((x) => downsample(x, 2), [random([2, 4, 6])])
    await gradcheck((x) => downsample(x), [random([1, 2, 5, 7])])
    await gradcheck(upsample, [random([2, 3, 3])])
  })
  it('renoise', async () => {
    const noise = { gamma: 1 / 3, seed: 7, stream: 9n }
    await gradcheck((x) => renoise(x, { alpha: 0.7, beta: 0.3, ...noise }), [random([2, 3, 2])])
    await gradcheck(
      (x, n) => renoise(x, { alpha: 0.7, beta: 0.3, noise: n }),
      [random([2, 3, 2]), random([2, 6, 4])],
    )
  })
  it('mix and euler', async () => {
    const sigma = Tensor.from([0.25, 0.9])
    await gradcheck((a, b) => mix(a, b, sigma), [random([2, 3, 2]), random([2, 3, 2])])
    const v = [random([2, 5]), random([2, 5]), random([2, 5])]
    await gradcheck((x, c, u) => euler(x, c, u, { deltaSigma: -0.1, guidance: 7 }), v)
    await gradcheck((x, c) => euler(x, c, null, { deltaSigma: -0.1 }), v.slice(0, 2))
  })
  it('packTokens and unpatchify', async () => {
    const columns = [
      {
        clips: [
          { rowOffset: 0, rowStride: 5 },
          { rowOffset: 1, rowStride: 5 },
        ],
      },
      { clips: [{ rowOffset: 10, rowStride: 2 }] },
    ]
    const clips = [random([2, 3, 1, 2, 2]), random([2, 3, 2, 2, 4]), random([2, 3, 1, 4, 2])]
    await gradcheck((a, b, c) => packTokens([[a, b], [c]], { latentTokens: 14, columns }), clips)
    await gradcheck(
      (t) => unpatchify(t, { rowOffset: 1, rowStride: 4, shape: [2, 2, 1, 2, 4] }),
      [random([7, 8])],
    )
  })
  it('mse, for prediction and target', () => gradcheck(mse, [random([3, 2, 4]), random([3, 2, 4])]))
})

describe('the tape', () => {
  const leaf = (values: number[], dtype: 'f32' | 'bf16' = 'f32') => {
    const t = Tensor.from(values, [values.length], dtype)
    t.requiresGrad = true
    return t
  }
  const gradOf = async (t: Tensor) => [...(await (t.grad as Tensor).floats())]

  it('sums the gradients of every use of a tensor', () =>
    gradcheck((x) => add(mul(x, x), scale(mul(add(x, x), square(x)), 0.5)), [random([7])]))

  it('adds to a gradient that is there already', async () => {
    const x = leaf([1, 2])
    x.grad = Tensor.from([10, 20])
    scope(() => backward(sum(square(x))))
    scope(() => backward(sum(scale(x, 3))))
    expect(await gradOf(x)).toEqual([15, 27])
  })

  it('adds to the gradients of weights in place', async () => {
    const w = leaf([1, 2, 3, 4])
    const matrix = Tensor.from([1, 2, 3, 4], [2, 2])
    matrix.requiresGrad = true
    const buffer = Tensor.full([2, 2], 100)
    matrix.grad = buffer
    scope(() => backward(sum(linear(Tensor.from([1, 2], [1, 2]), matrix))))
    expect(matrix.grad).toBe(buffer)
    expect([...(await buffer.floats())]).toEqual([101, 102, 101, 102])
    w.dispose()
  })

  it('keeps f32 gradients for bf16 leaves', async () => {
    const x = random([4, 6])
    const w = random([5, 6])
    const run = async (dtype: 'f32' | 'bf16') => {
      const weight = noGrad(() => cast(w, dtype))
      const own = weight === w ? w.view(w.shape) : weight
      own.requiresGrad = true
      scope(() => backward(sum(square(linear(cast(x, dtype), own)))))
      expect(own.grad?.dtype).toBe('f32')
      return (own.grad as Tensor).floats()
    }
    expect(worst(await run('bf16'), await run('f32'))).toBeLessThan(0.03)
  })

  it('records nothing under noGrad and for tensors that need no gradient', async () => {
    const x = leaf([2])
    scope(() => {
      const constant = noGrad(() => square(x))
      backward(sum(mul(x, constant)))
    })
    expect(await gradOf(x)).toEqual([4])
  })

  it('gives the same gradients through checkpoint()', async () => {
    const [w, x] = [random([3, 3]), random([2, 3])]
    const block = (t: Tensor) => tanh(linear(silu(linear(t, w)), w))
    const run = async (wrapped: boolean) => {
      for (const t of [w, x]) {
        t.requiresGrad = true
        t.grad = null
      }
      scope(() => {
        const h = square(x)
        const y = wrapped
          ? (checkpoint((t) => [block(block(t as Tensor))], [h])[0] as Tensor)
          : block(block(h))
        const z = wrapped
          ? (checkpoint((t) => checkpoint((u) => [block(u as Tensor)], [t as Tensor]), [y])[0] as Tensor)
          : block(y)
        backward(sum(mul(z, h)))
      })
      return [await (w.grad as unknown as Tensor).floats(), await (x.grad as unknown as Tensor).floats()]
    }
    expect(await run(true)).toEqual(await run(false))
  })

  it('goes through checkpoint() of a leaf and of several outputs', async () => {
    const x = leaf([1, 2, 3])
    scope(() => {
      const [a, b] = checkpoint((t) => [square(t as Tensor), scale(t as Tensor, 5)], [x]) as [Tensor, Tensor]
      backward(sum(add(a, b)))
    })
    expect(await gradOf(x)).toEqual([7, 9, 11])
  })

  it('frees what it made once the scope ends, and keeps the gradients', async () => {
    const x = keep(leaf([1, 2, 3]))
    const before = await live()
    for (let i = 0; i < 20; i++) {
      scope(() => {
        const h = silu(square(x))
        const y = checkpoint((t) => [tanh(exp(t as Tensor))], [h])[0] as Tensor
        backward(sum(mul(y, h)))
      })
    }
    // The gradient of x is all that is new.
    expect((await live()) - before).toBe(12)
    x.dispose()
  })

  it('refuses to start from many elements without a seed', () => {
    expect(() => backward(Tensor.zeros([2]))).toThrow(/one element/)
  })
})
