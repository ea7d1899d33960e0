import { PyraflowError } from '../engine/errors.ts'
import { emitWarning } from '../text/encoder.ts'

/** What is wrong with an entry of a data set. */
export type BadReason =
  /** A line that is not an entry. */
  | 'line'
  | 'caption'
  | 'missing'
  | 'unreadable'
  | 'short'
  /** A picture where no bucket has one frame. */
  | 'bucket'

/** An entry of a data set that cannot be used. */
export interface BadItem {
  readonly reason: BadReason
  /** File and line of the entry, or the path of the file. */
  readonly place: string
  readonly error: PyraflowError
}

/** What becomes of entries that cannot be used: the first one is an error, they are left out, or up to so many are. */
export type OnBad = 'fail' | 'skip' | { readonly limit: number }

/** Names and counts the entries that cannot be used, and ends the work when there are more than the caller allows. */
export class BadItems {
  readonly items: BadItem[] = []
  readonly #limit: number
  readonly #report: (item: BadItem) => void

  /**
   * @param report - is told of every entry that is left out; default: a process warning
   * @throws ERR_OPTION for a limit that is no whole number
   */
  constructor(onBad: OnBad = 'fail', report?: ((item: BadItem) => void) | undefined) {
    this.#limit = onBad === 'fail' ? 0 : onBad === 'skip' ? Number.POSITIVE_INFINITY : onBad?.limit
    this.#report = report ?? (({ error }) => emitWarning(`left out: ${error.message}`))
    if (this.#limit === Number.POSITIVE_INFINITY) return
    if (Number.isSafeInteger(this.#limit) && this.#limit >= 0) return
    throw new PyraflowError('ERR_OPTION', {
      what: 'onBad',
      expected: "'fail', 'skip' or { limit: a whole number }",
      received: JSON.stringify(onBad),
    })
  }

  /** Counts one. @throws its error when nothing may be left out, or an ERR_IO that holds it when it is one too many */
  add(item: BadItem): void {
    if (this.#limit === 0) throw item.error
    if (this.items.length >= this.#limit) {
      throw new PyraflowError('ERR_IO', {
        what: 'data set',
        expected: `at most ${this.#limit} entries that cannot be used`,
        received: `another one: ${item.error.message}`,
        remedy: 'List them all with `pyraflow doctor data`, repair or remove them, or allow more (onBad)',
        cause: item.error,
      })
    }
    this.items.push(item)
    this.#report(item)
  }
}
