import { PyraflowError } from '../engine/errors.ts'
import { sum } from '../ops/reduce.ts'
import { keep } from '../tensor/scope.ts'
import type { Tensor } from '../tensor/tensor.ts'

/** Finds out whether tensors hold nothing but finite numbers: a NaN or an infinity makes their sum one, too. */
export class FiniteCheck {
  readonly #sums: { name: string; total: Tensor }[] = []

  /** Queues the sum; the tensor itself may be freed at once. */
  add(name: string, tensor: Tensor): void {
    this.#sums.push({ name, total: keep(sum(tensor)) })
  }

  /** The name of the first tensor that is not finite, or undefined, once all are computed. Frees the sums. */
  async first(): Promise<string | undefined> {
    try {
      const totals = await Promise.all(this.#sums.map(({ total }) => total.item()))
      return this.#sums[totals.findIndex((total) => !Number.isFinite(total))]?.name
    } finally {
      this.dispose()
    }
  }

  dispose(): void {
    for (const { total } of this.#sums) total.dispose()
  }
}

/** ERR_NUMERICS for a result that is not finite. */
export function nonFinite(where: string, layer: string | undefined): PyraflowError {
  return new PyraflowError('ERR_NUMERICS', {
    what: where,
    expected: 'finite numbers',
    received: `NaN or infinity${layer === undefined ? '' : `, first in ${layer}`}`,
    remedy: 'Check the weights with `pyraflow verify`, use f32 instead of bf16, or lower the guidance scale.',
  })
}
