import { PyraflowError } from '../engine/errors.ts'

export interface GuardOptions {
  /** Validations in a row that may be worse than the best before the run ends. Default 2. */
  patience?: number
  /** How much worse than the best, as a share of it, counts as worse. Default 0.02. */
  tolerance?: number
  signal?: AbortSignal | undefined
}

/** The run has begun to forget: it ends with this event, after a checkpoint. */
export interface GuardEvent {
  readonly type: 'guard'
  /** Where the validation loss was `loss`. */
  readonly step: number
  readonly loss: number
  /** Step and loss of the best validation. */
  readonly best: { readonly step: number; readonly loss: number }
}

interface Validation {
  readonly step: number
  readonly loss: number
}

const isValidation = (event: { type: string }): event is { type: 'validation' } & Validation =>
  event.type === 'validation'

/**
 * Ends a run when its validation loss has got worse: clips that a run of a few clips does not train on, or videos of prior
 * prompts, show when it learns its clips by heart. The events are the run's own, then a {@link GuardEvent}.
 *
 * @param run - starts the run with a signal that stops it, e.g. `(signal) => trainer.run({ signal })`
 * @throws what the run throws; ERR_OPTION when it ends without a single validation
 */
export async function* guarded<E extends { readonly type: string }>(
  run: (signal: AbortSignal) => AsyncIterable<E>,
  options: GuardOptions = {},
): AsyncGenerator<E | GuardEvent> {
  const { patience = 2, tolerance = 0.02, signal } = options
  const stop = new AbortController()
  let best: Validation | undefined
  let verdict: GuardEvent | undefined
  let worse = 0
  try {
    for await (const event of run(signal ? AbortSignal.any([signal, stop.signal]) : stop.signal)) {
      yield event
      if (!isValidation(event) || verdict) continue
      const { step, loss } = event
      if (!best || loss < best.loss) best = { step, loss }
      worse = loss > best.loss * (1 + tolerance) ? worse + 1 : 0
      if (worse < patience) continue
      verdict = { type: 'guard', step, loss, best }
      stop.abort()
    }
  } catch (error) {
    // The run saves and says that it was aborted; that was asked for here.
    if (!verdict || signal?.aborted || !(error instanceof PyraflowError) || error.code !== 'ERR_ABORTED')
      throw error
  }
  if (verdict) yield verdict
  else if (!best) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'overfit guard',
      expected: 'a run that validates now and then',
      received: 'no validation',
      remedy: 'Give the trainer clips to validate on, and validateEvery.',
    })
  }
}
