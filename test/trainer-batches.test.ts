import { describe, expect, test } from 'vitest'
import { type Batch, BatchOrder, type BatchOrderOptions } from '../lib/train/batches.ts'
import type { LatentBucket } from '../lib/train/latent-source.ts'

const bucket = (frames: number, first: number, clips: number, side = 8): LatentBucket => ({
  shape: [16, frames, side, side],
  indices: Int32Array.from({ length: clips }, (_, i) => first + i),
})
const orderOf = (buckets: LatentBucket[], options: Partial<BatchOrderOptions> = {}): BatchOrder =>
  new BatchOrder({ buckets }, { batchSize: 8, columns: [0, 1, 1, 2], seed: 5, ...options })
const samples = (batch: Batch): number => batch.parts.reduce((n, { indices }) => n + indices.length, 0)
const range = (n: number): number[] => Array.from({ length: n }, (_, i) => i)

describe('the order of batches', () => {
  test('shows every clip equally often, also where a bucket does not divide into batches', () => {
    for (const [clips, batches] of [
      [16, 20],
      [11, 22],
      [3, 3],
    ] as const) {
      const order = orderOf([bucket(4, 0, clips)])
      const seen = new Array<number>(clips).fill(0)
      for (const n of range(batches)) for (const i of order.at(n).parts[0]!.indices) seen[i]!++
      expect(Math.max(...seen) - Math.min(...seen), `${clips} clips`).toBeLessThanOrEqual(1)
    }
  })

  test('keeps buckets apart and visits each by its number of clips', () => {
    const buckets = [bucket(4, 0, 40), bucket(4, 40, 16, 16), bucket(1, 56, 3)]
    const order = orderOf(buckets)
    const visits = [0, 0, 0]
    for (const n of range(80)) {
      const { parts, rows } = order.at(n)
      expect(parts).toHaveLength(1)
      expect(rows).toBe(2)
      const { indices, shape } = parts[0]!
      expect(indices).toHaveLength(8)
      const of = buckets.findIndex((b) => b.shape === shape)
      for (const i of indices) expect(buckets[of]!.indices).toContain(i)
      visits[of]!++
    }
    // Rounds of 5 + 2 + 1 batches.
    expect(visits).toEqual([50, 20, 10])
  })

  test('is a function of the number of the batch alone', () => {
    const make = (): BatchOrder => orderOf([bucket(4, 0, 21), bucket(1, 21, 9)], { imageRatio: 0.25 })
    const order = make()
    const straight = range(60).map((n) => order.at(n))
    const other = make()
    for (const n of [59, 3, 31, 0, 17]) expect(other.at(n)).toEqual(straight[n])
    expect(orderOf([bucket(4, 0, 21)], { seed: 6 }).at(0)).not.toEqual(orderOf([bucket(4, 0, 21)]).at(0))
  })

  for (const [imageRatio, batchSize] of [
    [0.125, 32],
    [0.125, 4],
    [0.3, 20],
    [0.5, 4],
    [0.9, 40],
    [1, 8],
  ] as const) {
    test(`makes ${imageRatio} of the samples images in batches of ${batchSize}, in whole sets`, () => {
      const order = orderOf([bucket(4, 0, 50), bucket(1, 50, 20)], { imageRatio, batchSize })
      let images = 0
      let withVideos = 0
      const many = 400
      for (const n of range(many)) {
        const { parts, rows, counter } = order.at(n)
        if (parts.some(({ shape }) => shape[1] === 4)) expect(counter).toBe(++withVideos)
        expect(samples({ parts, rows, counter })).toBe(batchSize)
        for (const { columns, indices, shape } of parts) {
          expect(columns.length * rows).toBe(indices.length)
          // The stage mix holds in each part by itself.
          expect(columns.filter((k) => k === 1)).toHaveLength(columns.length / 2)
          if (shape[1] === 1) images += indices.length
        }
      }
      expect(images / (many * batchSize)).toBeCloseTo(imageRatio, 2)
    })
  }

  test('takes images from buckets of single frames, from first frames, or from both', () => {
    const buckets = [bucket(4, 0, 40), bucket(1, 40, 40)]
    const found = (images?: BatchOrderOptions['images'], from = buckets): string[] => {
      const order = orderOf(from, { imageRatio: 1, images })
      const kinds = range(40).flatMap((n) => order.at(n).parts.map((p) => `${p.shape[1]}${p.still}`))
      return [...new Set(kinds)].sort()
    }
    expect(found()).toEqual(['1false'])
    expect(found(undefined, [buckets[0]!])).toEqual(['4true'])
    expect(found('buckets')).toEqual(['1false'])
    expect(found('frames')).toEqual(['4true'])
    expect(found('both')).toEqual(['1false', '4true'])
  })

  test('lists a batch of every kind, and gives no other', () => {
    const buckets = [bucket(4, 0, 40), bucket(2, 40, 8), bucket(1, 48, 8)]
    const order = orderOf(buckets, { imageRatio: 0.3, batchSize: 16, images: 'both' })
    const name = ({ parts, rows }: Batch): string =>
      JSON.stringify([rows, parts.map(({ shape, columns, still }) => [shape, columns, still])])
    const kinds = order.kinds().map(name)
    // Two video buckets with three pools of images, with one set of images or two.
    expect(new Set(kinds).size).toBe(12)
    const seen = new Set(range(400).map((n) => name(order.at(n))))
    expect([...seen].filter((kind) => !kinds.includes(kind))).toEqual([])
  })

  test('refuses a share of what the data set does not have', () => {
    for (const [buckets, options] of [
      [[bucket(1, 0, 8)], { imageRatio: 0.5 }],
      [[bucket(4, 0, 8)], { imageRatio: 0.5, images: 'buckets' }],
      [[bucket(4, 0, 0)], {}],
    ] as const) {
      expect(() => orderOf([...buckets], options)).toThrow(
        expect.objectContaining({ code: 'ERR_OPTION', message: expect.stringContaining('a data set with') }),
      )
    }
  })
})
