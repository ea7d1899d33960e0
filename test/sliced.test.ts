import { describe, expect, test } from 'vitest'
import { engine } from '../lib/engine/engine.ts'
import { mse } from '../lib/ops/mse.ts'
import { axpby } from '../lib/ops/pointwise.ts'
import { mean } from '../lib/ops/reduce.ts'
import { scope } from '../lib/tensor/scope.ts'
import { sliced } from '../lib/tensor/sliced.ts'
import { backward, backwardSteps, needsGrad, type Steps } from '../lib/tensor/tape.ts'
import { Tensor } from '../lib/tensor/tensor.ts'

function leaf(values: number[]): Tensor {
  const t = Tensor.from(values)
  t.requiresGrad = true
  return t
}

/** Spins until the slice that is running must end. */
function outlast(): void {
  const until = performance.now() + 6
  while (performance.now() < until);
}

describe('work queued in slices', () => {
  test('lets the event loop turn, and gives the gradients of one piece', async () => {
    const [x, target] = [leaf([1, 2, 3]), Tensor.from([0, 0, 0])]
    let turns = 0
    const timer = setInterval(() => turns++, 0)
    const loss = await sliced(function* (): Steps<Tensor> {
      let y = axpby(x, x, 1, 1)
      for (let i = 0; i < 4; i++) {
        outlast()
        yield
        y = axpby(y, y, 0.5, 0.5)
      }
      const value = mean(mse(y, target))
      yield* backwardSteps(value)
      return value
    })
    clearInterval(timer)
    expect(turns).toBeGreaterThan(2)
    // d/dx mean((2x)²) = 8x / 3
    expect([...(await (x.grad as Tensor).floats())].map((v) => v.toFixed(4))).toEqual(
      [1, 2, 3].map((v) => ((8 * v) / 3).toFixed(4)),
    )
    expect(await loss.item()).toBeCloseTo((4 * 14) / 3, 4)
    for (const t of [loss, target, x.grad as Tensor, x]) t.dispose()
  })

  test('is not disturbed by work in between, nor disturbs it', async () => {
    const [a, b] = [leaf([2]), leaf([5])]
    const square = (t: Tensor): Steps<Tensor> =>
      (function* () {
        const y = mse(axpby(t, t, 1, 0), Tensor.from([0]))
        outlast()
        yield
        const value = mean(y)
        outlast()
        yield
        yield* backwardSteps(value)
        return value
      })()
    const both = Promise.all([sliced(() => square(a)), sliced(() => square(b))])
    const between = new Promise<void>((resolve) => {
      setImmediate(() => {
        scope(() => {
          const c = leaf([7])
          backward(mean(mse(axpby(c, c, 1, 0), Tensor.from([0]))))
          expect(c.grad).not.toBeNull()
          c.grad?.dispose()
        })
        resolve()
      })
    })
    const values = await both
    await between
    expect(await Promise.all(values.map((v) => v.item()))).toEqual([4, 25])
    expect(await (a.grad as Tensor).item()).toBeCloseTo(4)
    expect(await (b.grad as Tensor).item()).toBeCloseTo(10)
    for (const t of [...values, a.grad as Tensor, b.grad as Tensor, a, b]) t.dispose()
  })

  test('frees everything but its result, also when it fails', async () => {
    await engine.idle()
    const before = engine.memory().live
    const kept = await sliced(function* (): Steps<{ list: Tensor[] }> {
      const x = Tensor.zeros([1000])
      yield
      Tensor.zeros([1000])
      return { list: [axpby(x, x, 1, 1)] }
    })
    await engine.idle()
    expect(engine.memory().live - before).toBe(kept.list[0]?.bytes)
    kept.list[0]?.dispose()
    const failing = sliced(function* (): Steps<Tensor> {
      Tensor.zeros([1000])
      yield
      throw new Error('halfway')
    })
    await expect(failing).rejects.toThrow('halfway')
    await engine.idle()
    expect(engine.memory().live).toBe(before)
  })

  test('records nothing without gradients', async () => {
    const x = leaf([1])
    const results = await sliced(
      function* (): Steps<boolean[]> {
        const inside = needsGrad(axpby(x, x, 1, 1))
        yield
        return [inside, needsGrad(x)]
      },
      { grad: false },
    )
    expect(results).toEqual([false, false])
    expect(needsGrad(x)).toBe(true)
    x.dispose()
  })
})
