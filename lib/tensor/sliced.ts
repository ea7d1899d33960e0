import { setImmediate } from 'node:timers/promises'
import { engine } from '../engine/engine.ts'
import { throwIfAborted } from '../engine/errors.ts'
import { OpenScope } from './scope.ts'
import { type Steps, Tape } from './tape.ts'

/** How long a slice keeps the event loop; ops take microseconds to queue, so the overrun is one block's worth. */
const SLICE_MS = 1.5

/**
 * Queues work that pauses at its yields, letting the event loop turn every few milliseconds. As in a scope, everything
 * made in it is freed at the end but the tensors of its result, which are the caller's; tape and scope are its own, so
 * whatever runs between the slices is not disturbed. Its commands belong to `job`, unless `within` runs the slices.
 */
export async function sliced<T>(
  steps: () => Steps<T>,
  options: { grad?: boolean; job?: number; within?: <R>(fn: () => R) => R } = {},
): Promise<T> {
  const { grad = true, job = 0, within = (fn) => engine.within(job, fn) } = options
  const scope = new OpenScope()
  const tape = new Tape(grad)
  try {
    const generator = steps()
    for (;;) {
      const until = performance.now() + SLICE_MS
      const slice = (): IteratorResult<void, T> => {
        let next = generator.next()
        while (!next.done && performance.now() < until) next = generator.next()
        return next
      }
      const result = within(() => tape.run(() => scope.run(slice)))
      if (result.done) return scope.release(result.value)
      await setImmediate()
    }
  } finally {
    within(() => scope.close())
  }
}

/** Ends work that pauses at the first pause after the signal has fired. @throws ERR_ABORTED */
export function* abortableSteps<T>(
  steps: Steps<T>,
  signal: AbortSignal | undefined,
  what = 'generation',
): Steps<T> {
  try {
    for (;;) {
      throwIfAborted(signal, what)
      const { value, done } = steps.next()
      if (done) return value
      yield
    }
  } finally {
    steps.return(undefined as never)
  }
}
