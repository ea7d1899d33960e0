import { abortable } from '../engine/abortable.ts'
import { engine } from '../engine/engine.ts'
import { throwIfAborted } from '../engine/errors.ts'
import { sliced } from '../tensor/sliced.ts'
import type { Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { inTurn } from './loaded.ts'

/** A matrix that can leave memory, because it can be read again. */
interface Guest {
  /** What a layer computes with: the matrix, or its packed form. */
  readonly memory: Tensor
  /** Queues the reading. */
  readonly fill: () => void
  present: boolean
}

const guests = new WeakMap<Tensor, Guest>()

// What a rehearsal takes for granted, whatever is in memory while it runs.
let assumed: boolean | undefined

/** Runs a synchronous piece of a rehearsal as if networks that can leave memory were, or were not, made to. */
export function assumeOffload<T>(active: boolean, fn: () => T): T {
  const before = assumed
  assumed = active
  try {
    return fn()
  } finally {
    assumed = before
  }
}

/**
 * Runs a synchronous piece of work that computes with a matrix, or reads it: one that is not in memory is read before it
 * and freed after it, all of which is only queued.
 */
export function whileThere<T>(weight: Tensor, fn: () => T): T {
  const guest = guests.get(weight)
  if (!guest) return fn()
  const { memory, fill } = guest
  if (engine.rehearsing ? !assumed : guest.present) return fn()
  engine.alloc(memory.bytes, memory.storage)
  try {
    fill()
    return fn()
  } finally {
    engine.free(memory.storage, true)
  }
}

/**
 * Lets the matrices of a network out of memory: each is then read from its file whenever its layer runs, so that one of
 * them is there at a time. Results are the same bits; what it costs is the reading.
 */
export class Offload {
  readonly #guests: Guest[] = []
  readonly #begins: 'possible' | 'absent'
  #users = 0

  /** `absent`: no matrix is in memory after loading. */
  constructor(begins: 'possible' | 'absent') {
    this.#begins = begins
  }

  /** A matrix, which has no memory yet, and what queues its reading once it has. */
  add(weight: Tensor, fill: () => void): void {
    const guest = { memory: weight.packed ?? weight, fill, present: false }
    this.#guests.push(guest)
    guests.set(weight, guest)
  }

  /** Queues the first reading of one: to stay, or, to be looked at, for a moment. */
  admit(weight: Tensor): void {
    if (this.#begins === 'absent') whileThere(weight, () => undefined)
    else this.#come(guests.get(weight) as Guest)
  }

  /** Bytes of the matrices when they are in memory. */
  get bytes(): number {
    return this.#guests.reduce((n, { memory }) => n + memory.bytes, 0)
  }

  /** Whether none of them is in memory. */
  get absent(): boolean {
    return this.#guests.every(({ present }) => !present)
  }

  /** Frees them after what is queued. They stay away until the function that this returns is called, and come back by `restore`. */
  begin(): () => void {
    this.#users++
    this.#leave()
    let over = false
    return () => {
      if (!over) this.#users--
      over = true
    }
  }

  /**
   * Reads back into memory what is not there, unless somebody wants it away.
   *
   * @throws ERR_MEMORY, ERR_IO, ERR_ABORTED; none is in memory then
   */
  restore(signal?: AbortSignal): Promise<void> {
    return inTurn(async () => {
      const job = engine.newJob()
      try {
        await sliced(() => this.#comeSteps(signal), { grad: false, job })
        await abortable(engine.idle(job), signal, job, 'loading')
      } catch (error) {
        await engine.cancel(job)
        this.#leave()
        throw error
      }
    })
  }

  *#comeSteps(signal: AbortSignal | undefined): Steps<void> {
    for (const guest of this.#guests) {
      throwIfAborted(signal, 'loading')
      if (this.#users > 0) return
      if (!guest.present) this.#come(guest)
      yield
    }
  }

  #come(guest: Guest): void {
    engine.alloc(guest.memory.bytes, guest.memory.storage)
    guest.present = true
    guest.fill()
  }

  #leave(): void {
    for (const guest of this.#guests) {
      if (guest.present) engine.free(guest.memory.storage, true)
      guest.present = false
    }
  }
}
