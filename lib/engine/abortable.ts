import { engine } from './engine.ts'
import { throwIfAborted } from './errors.ts'

/**
 * Waits for work of a job, or drops what is queued of it when the signal fires.
 *
 * @param what - what is under way, for the message
 * @throws ERR_ABORTED
 */
export async function abortable<T>(
  work: Promise<T>,
  signal: AbortSignal | undefined,
  job: number,
  what = 'generation',
): Promise<T> {
  if (!signal) return await work
  const stop = (): void => void engine.cancel(job)
  if (signal.aborted) stop()
  signal.addEventListener('abort', stop, { once: true })
  try {
    const result = await work
    throwIfAborted(signal, what)
    return result
  } catch (error) {
    throwIfAborted(signal, what)
    throw error
  } finally {
    signal.removeEventListener('abort', stop)
  }
}
