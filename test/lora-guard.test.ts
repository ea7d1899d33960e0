import { describe, expect, test } from 'vitest'
import { PyraflowError } from '../lib/engine/errors.ts'
import { guarded } from '../lib/train/guard.ts'

interface Event {
  type: string
  step: number
  loss: number
}

/** A run of a step and a validation for each loss, which saves and throws when it is aborted. */
async function* run(losses: readonly number[], signal: AbortSignal): AsyncGenerator<Event> {
  for (const [i, loss] of losses.entries()) {
    if (signal.aborted) {
      yield { type: 'checkpoint', step: i, loss: 0 }
      throw new PyraflowError('ERR_ABORTED', { what: 'training' })
    }
    yield { type: 'step', step: i + 1, loss: 0 }
    yield { type: 'validation', step: i + 1, loss }
  }
}

async function follow(
  losses: readonly number[],
  options: Parameters<typeof guarded>[1] = {},
): Promise<string[]> {
  const seen: string[] = []
  for await (const event of guarded((signal) => run(losses, signal), options)) {
    seen.push(`${event.type} ${event.step}`)
    if (event.type === 'guard' && 'best' in event)
      expect(event.best.loss).toBe(Math.min(...losses.slice(0, event.step)))
  }
  return seen
}

describe('the overfit guard', () => {
  test('ends a run after a checkpoint when its validation stays worse than the best', async () => {
    const seen = await follow([1, 0.8, 0.9, 0.95, 0.7, 0.6])
    expect(seen.slice(-3)).toEqual(['validation 4', 'checkpoint 4', 'guard 4'])
    expect((await follow([1, 0.8, 0.9, 0.6, 0.7, 0.5])).at(-1)).toBe('validation 6')
    expect((await follow([1, 0.8, 0.81, 0.812, 0.811])).at(-1)).toBe('validation 5')
    expect((await follow([1, 0.8, 0.81, 0.5], { patience: 1, tolerance: 0 })).at(-1)).toBe('guard 3')
  })

  test('passes on what the run and its caller end with, and refuses a run without validation', async () => {
    const stop = AbortSignal.abort()
    await expect(follow([1, 2, 3, 4], { signal: stop })).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    await expect(follow([])).rejects.toMatchObject({
      code: 'ERR_OPTION',
      message: expect.stringMatching(/validateEvery/),
    })
    const failing = async function* (): AsyncGenerator<Event> {
      yield { type: 'step', step: 1, loss: 1 }
      throw new PyraflowError('ERR_IO', { what: 'disk' })
    }
    const all = async (): Promise<void> => {
      for await (const _ of guarded(failing)) void _
    }
    await expect(all()).rejects.toMatchObject({ code: 'ERR_IO' })
  })
})
