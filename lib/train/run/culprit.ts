import { engine } from '../../engine/engine.ts'
import { sliced } from '../../tensor/sliced.ts'
import type { Steps } from '../../tensor/tape.ts'
import { Tensor } from '../../tensor/tensor.ts'

/**
 * Name of the first parameter whose gradient is not finite, in the order of backward, last made first: whatever comes
 * after it there only had it passed on.
 */
export async function firstBadGradient(
  parameters: ReadonlyMap<string, Tensor>,
  job: number,
): Promise<string | undefined> {
  const named = [...parameters].reverse().flatMap(([name, { grad }]) => (grad ? [[name, grad] as const] : []))
  const norms = await sliced(
    function* (): Steps<Tensor> {
      const all = Tensor.empty([named.length, 2])
      for (const [i, [, grad]] of named.entries()) {
        engine.run('grad_norm', [grad], [all.view([2], 2 * i)], [0])
        yield
      }
      return all
    },
    { grad: false, job },
  )
  try {
    const values = await norms.floats()
    return named.find((_, i) => !Number.isFinite(values[2 * i]))?.[0]
  } finally {
    norms.dispose()
  }
}

/** How a loss that is not finite is named: with the parts of it that are not. */
export function badLoss(metrics: Readonly<Record<string, number>>): string {
  const parts = Object.keys(metrics).filter((name) => !Number.isFinite(metrics[name]))
  return parts.length > 0 ? `loss (${parts.join(', ')})` : 'loss'
}
