import type { Tensor } from '../tensor/tensor.ts'

interface Entry {
  readonly tensor: Tensor
  users: number
}

// Converted and packed weights by where they come from and what was made of them.
const entries = new Map<string, Entry>()

/**
 * The weight of this key: made the first time, and then shared by everybody who loads it again until the last of them
 * has released it. Nobody may write it.
 */
export function share(key: string, make: () => Tensor): Tensor {
  const known = entries.get(key)
  if (known) {
    known.users++
    return known.tensor
  }
  const tensor = make()
  entries.set(key, { tensor, users: 1 })
  return tensor
}

/** Gives up one use of a weight, and returns it: nobody else may dispose it. */
export function release(key: string): Tensor | undefined {
  const entry = entries.get(key)
  if (entry && --entry.users === 0) {
    entries.delete(key)
    entry.tensor.dispose()
  }
  return entry?.tensor
}

let last: Promise<void> = Promise.resolve()

/**
 * Loads one network after the other: what the next one shares is then whole and checked, and no two of them hold a
 * tensor on its way at once.
 */
export async function inTurn<T>(load: () => Promise<T>): Promise<T> {
  const before = last
  let done: (() => void) | undefined
  last = new Promise((resolve) => {
    done = resolve
  })
  try {
    await before
    return await load()
  } finally {
    done?.()
  }
}
