import { availableParallelism } from 'node:os'

/** Decoders that run side by side: each is a process of one thread. */
export const DECODERS: number = Math.max(2, availableParallelism())

export interface AheadOptions {
  /** Loads that run at a time. */
  parallel: number
  /** Loads begun or finished that nobody has taken yet; at least 1. Bounds the memory. */
  hold: number
  signal?: AbortSignal | undefined
}

/**
 * Yields load(0), load(1), …, load(count − 1) in this order while later ones run. When the caller leaves the loop, or a
 * load fails, the signal of the others fires: nothing is left running behind the caller's back.
 *
 * @param count - may be infinite
 * @throws what `load` rejects with, when its turn comes
 */
export async function* ahead<T>(
  count: number,
  load: (index: number, signal: AbortSignal) => Promise<T>,
  { parallel, hold, signal }: AheadOptions,
): AsyncGenerator<T, void, undefined> {
  const stop = new AbortController()
  const any = signal ? AbortSignal.any([signal, stop.signal]) : stop.signal
  const waiting: Promise<T>[] = []
  let [begun, running] = [0, 0]
  const one = async (index: number): Promise<T> => {
    try {
      return await load(index, any)
    } finally {
      running--
      fill()
    }
  }
  const fill = (): void => {
    while (begun < count && running < parallel && waiting.length < hold && !stop.signal.aborted) {
      running++
      const promise = one(begun++)
      // Whoever takes it hears of its failure; until then it is no unhandled one.
      promise.catch(() => undefined)
      waiting.push(promise)
    }
  }
  try {
    for (let index = 0; index < count; index++) {
      fill()
      const value = await (waiting[0] as Promise<T>)
      waiting.shift()
      fill()
      yield value
    }
  } finally {
    stop.abort()
  }
}
