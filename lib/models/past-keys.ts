import { PyraflowError } from '../engine/errors.ts'
import type { KeysAndValues, PastReader, PastWriter } from '../nn/attention.ts'
import { copyInto } from '../ops/copy.ts'
import { type CurrentTokens, currentTokens } from '../pyramid/current.ts'
import type { Layout } from '../pyramid/layout.ts'
import { keep, scope } from '../tensor/scope.ts'
import { drain } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'

/**
 * Keys and values of text and history, kept for later calls over the same layout. Nothing of the past sees the current
 * clip (spec/dit-flux.md eq. 9): between the steps of a stage it differs in what the time does to it alone.
 */
export class PastKeys {
  readonly layout: Layout
  readonly current: CurrentTokens
  readonly #layers: KeysAndValues[] = []

  /** @throws ERR_OPTION when the layout's past sees the current clip. */
  constructor(layout: Layout, current: CurrentTokens = drain(currentTokens(layout))) {
    const { causal, columns } = layout
    if (!causal || columns.some(({ clips }) => clips.length < 2)) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'kept keys and values',
        expected: 'a causal layout with history in every column, whose past does not see the current clip',
        received: causal ? 'a column without history' : 'one in which every token sees every other',
      })
    }
    this.layout = layout
    this.current = current
  }

  /** For a call that computes everything. */
  writer(): PastWriter {
    let at = 0
    return {
      keep: ({ k, v }) => {
        const to = this.#layers[at] ?? {
          k: keep(Tensor.empty(k.shape, k.dtype)),
          v: keep(Tensor.empty(v.shape, v.dtype)),
        }
        this.#layers[at++] = to
        for (const name of ['k', 'v'] as const) this.#copy(name === 'k' ? k : v, to[name])
      },
    }
  }

  #copy(all: Tensor, to: Tensor): void {
    const width = all.shape[1] as number
    scope(() => {
      for (const { from, to: at, count } of this.current.past) {
        copyInto(all.view([count, width], from * width), to, 0, at)
      }
    })
  }

  /** For a call that computes the current tokens alone. @throws ERR_OPTION when nothing was kept. */
  reader(): PastReader {
    let at = 0
    if (this.#layers.length === 0) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'past',
        expected: 'keys and values that an earlier call kept',
        received: 'none',
        remedy: 'Call the network with `keep` first.',
      })
    }
    return { next: () => this.#layers[at++] as KeysAndValues, latents: this.current.latents }
  }

  dispose(): void {
    for (const { k, v } of this.#layers.splice(0)) for (const t of [k, v]) t.dispose()
  }
}
