import type { Tensor } from './tensor.ts'

type Frame = Set<Tensor>
let frame: Frame | null = null

/** Registers a new tensor with the innermost scope. */
export function track(tensor: Tensor): void {
  frame?.add(tensor)
}

/** Takes a tensor out of its scope: its owner now disposes it. */
export function keep<T extends Tensor>(tensor: T): T {
  frame?.delete(tensor)
  return tensor
}

function collect(value: unknown, found: Set<unknown>): void {
  if (value === null || typeof value !== 'object' || found.has(value)) return
  found.add(value)
  if (ArrayBuffer.isView(value)) return
  // Tensors end the walk: what hangs on them (grad) is not part of the result.
  if ('dispose' in value && 'storage' in Object.getPrototypeOf(value)) return
  for (const inner of value instanceof Map ? value.values() : Object.values(value)) collect(inner, found)
}

/**
 * Runs `fn` and disposes every tensor made inside it, except those in its result (arrays and plain objects are
 * searched), which pass to the surrounding scope. `fn` must be synchronous: queueing never waits.
 */
export function scope<T>(fn: () => T): T {
  const outer = frame
  const inner: Frame = new Set()
  frame = inner
  let result: T
  try {
    result = fn()
  } catch (error) {
    frame = outer
    for (const tensor of inner) tensor.dispose()
    throw error
  }
  frame = outer
  const kept = new Set<unknown>()
  collect(result, kept)
  for (const tensor of inner) {
    if (kept.has(tensor)) outer?.add(tensor)
    else tensor.dispose()
  }
  return result
}

/** A scope that several pieces of synchronous work share, whatever else runs between them. */
export class OpenScope {
  readonly #frame: Frame = new Set()

  run<T>(fn: () => T): T {
    const outer = frame
    frame = this.#frame
    try {
      return fn()
    } finally {
      frame = outer
    }
  }

  /** Hands the tensors of a result (arrays and plain objects are searched) to the caller. */
  release<T>(result: T): T {
    const found = new Set<unknown>()
    collect(result, found)
    for (const value of found) this.#frame.delete(value as Tensor)
    return result
  }

  /** Hands the tensors of a result over to the scope that surrounds the call. */
  passOn<T>(result: T): T {
    const found = new Set<unknown>()
    collect(result, found)
    for (const value of found) if (this.#frame.delete(value as Tensor)) track(value as Tensor)
    return result
  }

  /** Disposes everything that was made in it and not released. */
  close(): void {
    for (const tensor of this.#frame) tensor.dispose()
    this.#frame.clear()
  }
}

/** `scope` for work that pauses at its yields. */
export function* scopedSteps<T>(steps: Generator<void, T>): Generator<void, T> {
  const own = new OpenScope()
  try {
    for (;;) {
      const { value, done } = own.run(() => steps.next())
      if (done) return own.passOn(value)
      yield
    }
  } finally {
    own.close()
  }
}
