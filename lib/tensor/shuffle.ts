/** Mixes 32 bits so that neighbouring inputs give unrelated outputs (the finaliser of MurmurHash3). */
function mix(value: number): number {
  let h = value | 0
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b)
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35)
  return (h ^ (h >>> 16)) >>> 0
}

/**
 * Uniform number in [0, 1) as a pure function of `seed` and `index`: no state, so any position of a sequence can be
 * asked for directly, which is what makes resuming in the middle of an epoch cheap.
 */
export function uniformAt(seed: number, index: number): number {
  const low = mix(mix(seed + 0x9e3779b9) ^ Math.imul(index + 1, 0x9e3779b1))
  // The upper half of a large seed must count too, otherwise seeds 2³² apart would give one sequence.
  const high = mix(low ^ mix(Math.floor(seed / 2 ** 32) + 0x7f4a7c15))
  return high / 2 ** 32
}

/** `uniformAt` as a running generator. */
export function uniformStream(seed: number): () => number {
  let index = 0
  return () => uniformAt(seed, index++)
}

/** The numbers 0 … n−1 in an order that depends on `seed` alone (Fisher-Yates). */
export function shuffle(n: number, seed: number): Uint32Array {
  const order = Uint32Array.from({ length: n }, (_, i) => i)
  for (let i = n - 1; i > 0; --i) {
    const j = Math.floor(uniformAt(seed, i) * (i + 1))
    const kept = order[i]
    order[i] = order[j]
    order[j] = kept
  }
  return order
}
