import { concat, permute, slice } from '../ops/copy.ts'
import { add, mul } from '../ops/pointwise.ts'
import { scope } from '../tensor/scope.ts'
import type { Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { VaeNetwork } from './vae-network.ts'
import type { Pass } from './vae-pass.ts'

/** Overlapping square tiles (spec/vae.md §7): `size` and `step` in cells of the input, the others in the output's. */
export interface TileGrid {
  size: number
  step: number
  /** Width of the seam over which a tile fades into the one before. */
  blend: number
  /** What is left of a tile when the next one begins. */
  keep: number
}

const OVERLAP = 0.25

/** Tiles of `pixels` a side whose input is video. */
export function encodeGrid(pixels: number, factor: number): TileGrid {
  const latents = pixels / factor
  const blend = latents * OVERLAP
  return { size: pixels, step: pixels * (1 - OVERLAP), blend, keep: latents - blend }
}

/** Tiles of `pixels` a side whose input is latents. */
export function decodeGrid(pixels: number, factor: number): TileGrid {
  const latents = pixels / factor
  const blend = pixels * OVERLAP
  return { size: latents, step: latents * (1 - OVERLAP), blend, keep: pixels - blend }
}

/** Whether a clip of this height and width is cut at all. */
export function isCut(grid: TileGrid | null, height: number, width: number): grid is TileGrid {
  return grid !== null && (height > grid.size || width > grid.size)
}

/** Where tiles begin along an axis of n cells. */
export function tileStarts(n: number, step: number): number[] {
  return Array.from({ length: Math.ceil(n / step) }, (_, i) => i * step)
}

/** Runs a chunk [B, C, T, H, W], which stays the caller's. */
export function* runChunk(network: VaeNetwork, x: Tensor, pass: Pass): Steps<Tensor> {
  const y = yield* network.run(permute(x, [0, 2, 3, 4, 1]), pass)
  const result = permute(y, [0, 4, 1, 2, 3])
  pass.free(y)
  return result
}

/** Runs x [B, C, T, H, W] in consecutive pieces of these many frames and joins what comes out. */
export function* overTime(
  x: Tensor,
  lengths: readonly number[],
  run: (chunk: Tensor) => Steps<Tensor>,
): Steps<Tensor> {
  if (lengths.length === 1) return yield* run(x)
  const parts: Tensor[] = []
  let start = 0
  for (const length of lengths) {
    const chunk = slice(x, 2, start, length)
    parts.push(yield* run(chunk))
    chunk.dispose()
    start += length
  }
  return joined(parts, 2)
}

/** Runs x [B, C, T, H, W] tile by tile and blends what comes out; `run` gets each tile with its number. */
export function* overTiles(
  x: Tensor,
  grid: TileGrid | null,
  run: (tile: Tensor, index: number) => Steps<Tensor>,
): Steps<Tensor> {
  const [height, width] = x.shape.slice(3) as [number, number]
  if (!isCut(grid, height, width)) return yield* run(x, 0)
  const rows: Tensor[] = []
  let above: Tensor[] = []
  let index = 0
  for (const y0 of tileStarts(height, grid.step)) {
    const strip = slice(x, 3, y0, Math.min(grid.size, height - y0))
    const row: Tensor[] = []
    for (const [j, x0] of tileStarts(width, grid.step).entries()) {
      const part = slice(strip, 4, x0, Math.min(grid.size, width - x0))
      let tile = yield* run(part, index++)
      part.dispose()
      // Into the tile above and then into the left one, both as already blended and before they are cropped (10).
      if (above[j]) tile = blended(above[j], tile, 3, grid.blend)
      const left = row[j - 1]
      if (left) tile = blended(left, tile, 4, grid.blend)
      row.push(tile)
    }
    strip.dispose()
    rows.push(
      scope(() =>
        concat(
          row.map((tile) => head(head(tile, 3, grid.keep), 4, grid.keep)),
          4,
        ),
      ),
    )
    for (const tile of above) tile.dispose()
    above = row
    yield
  }
  for (const tile of above) tile.dispose()
  return joined(rows, 3)
}

const head = (x: Tensor, axis: number, count: number): Tensor =>
  slice(x, axis, 0, Math.min(count, x.shape[axis] as number))

function joined(parts: readonly Tensor[], axis: number): Tensor {
  const whole = concat(parts, axis)
  for (const part of parts) part.dispose()
  return whole
}

/** `tile`, its first cells along `axis` fading in from the last ones of `before`; `tile` is freed. */
function blended(before: Tensor, tile: Tensor, axis: number, blend: number): Tensor {
  const [end, size] = [before.shape[axis] as number, tile.shape[axis] as number]
  const count = Math.min(end, size, blend)
  const result = scope(() => {
    const shape = tile.shape.map((_, i) => (i === axis ? count : 1))
    const weights = Float32Array.from({ length: count }, (_, i) => i / count)
    const fadeIn = Tensor.from(weights, shape, tile.dtype)
    const fadeOut = Tensor.from(
      weights.map((w) => 1 - w),
      shape,
      tile.dtype,
    )
    const seam = add(
      mul(slice(before, axis, end - count, count), fadeOut),
      mul(slice(tile, axis, 0, count), fadeIn),
    )
    return count === size ? seam : concat([seam, slice(tile, axis, count, size - count)], axis)
  })
  tile.dispose()
  return result
}
