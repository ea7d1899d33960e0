import { PyraflowError } from '../engine/errors.ts'

/** A seed or stream id: a whole number up to 2⁵³, or any 64-bit bigint. */
export type Seed = number | bigint

/** A 64-bit id as [low, high] words of 32 bits. @throws ERR_OPTION for other numbers. */
export function words(id: Seed, name = 'seed'): [number, number] {
  if (typeof id === 'number' && !Number.isSafeInteger(id)) {
    throw new PyraflowError('ERR_OPTION', {
      what: name,
      expected: 'a whole number up to 2^53, or a bigint',
      received: String(id),
    })
  }
  const bits = BigInt.asUintN(64, BigInt(id))
  return [Number(bits & 0xffffffffn), Number(bits >> 32n)]
}

/** High word of a product of two 32-bit words, by halves so that every partial sum is exact. */
function multiplyHigh(a: number, b: number): number {
  const [al, ah, bl, bh] = [a & 0xffff, a >>> 16, b & 0xffff, b >>> 16]
  const middle = ah * bl + Math.floor((al * bl) / 0x10000)
  const carry = (middle % 0x10000) + al * bh
  return (ah * bh + Math.floor(middle / 0x10000) + Math.floor(carry / 0x10000)) >>> 0
}

/** Philox4x32-10: the four words of one block, as native/core/philox.h gives them. */
export function philox(
  seed: readonly [number, number],
  stream: readonly [number, number],
  block: number,
): number[] {
  let [c0, c1, c2, c3] = [block >>> 0, Math.floor(block / 0x100000000), stream[0], stream[1]]
  let [k0, k1] = seed
  for (let round = 0; round < 10; round++) {
    const [high0, low0] = [multiplyHigh(c0, 0xd2511f53), Math.imul(c0, 0xd2511f53) >>> 0]
    const [high1, low1] = [multiplyHigh(c2, 0xcd9e8d57), Math.imul(c2, 0xcd9e8d57) >>> 0]
    c0 = (high1 ^ c1 ^ k0) >>> 0
    c1 = low1
    c2 = (high0 ^ c3 ^ k1) >>> 0
    c3 = low0
    k0 = (k0 + 0x9e3779b9) >>> 0
    k1 = (k1 + 0xbb67ae85) >>> 0
  }
  return [c0, c1, c2, c3]
}

const MASK = 0xffffffffffffffffn

/** Spreads every bit of a 64-bit id over all of them; ids that differ stay different. */
export function mix64(id: bigint): bigint {
  let z = id & MASK
  z = ((z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n) & MASK
  z = ((z ^ (z >> 27n)) * 0x94d049bb133111ebn) & MASK
  return z ^ (z >> 31n)
}

/** 64-bit hash (FNV-1a, then mixed) of a list of names and numbers, on top of `base`. */
export function hashNames(base: bigint, names: readonly (string | number | bigint)[]): bigint {
  let h = mix64(base ^ 0xcbf29ce484222325n)
  for (const name of names) {
    // The type and the end are hashed too: ('ab') , ('a', 'b'), (1) and ('1') are four streams.
    const text = `${typeof name === 'string' ? 's' : 'n'}${name}\0`
    for (const byte of new TextEncoder().encode(text)) h = ((h ^ BigInt(byte)) * 0x100000001b3n) & MASK
  }
  return mix64(h)
}
