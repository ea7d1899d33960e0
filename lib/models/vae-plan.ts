import { PyraflowError } from '../engine/errors.ts'
import { sizeOf } from '../tensor/tensor.ts'
import type { Estimate } from './vae-blocks.ts'
import type { VaeNetwork } from './vae-network.ts'
import { isCut, type TileGrid, tileStarts } from './vae-pieces.ts'

/** How much memory a VAE may take, or the pieces themselves; without any of them a clip is worked on as a whole. */
export interface VaePieces {
  /**
   * Bytes that encoding or decoding may take besides weights and input. What fits is chosen by estimate: the whole
   * clip, else temporal chunks, which give the same numbers, else tiles, whose seams are blended.
   */
  maxMemory?: number | undefined
  /** Tile side in pixels (the reference's `tile_sample_min_size`); a clip no larger than it is not cut. */
  tile?: number | undefined
  /** Latent frames of a temporal chunk; the first chunk has one more (the reference's `window_size`). */
  window?: number | undefined
}

/** Pieces as they are going to be; null: not cut. */
export interface VaePlan {
  tile: number | null
  window: number | null
}

const TILES = [1024, 768, 512, 384, 256, 192, 128, 64] as const
const WINDOWS = [32, 16, 8, 4, 2, 1] as const

/** @throws ERR_OPTION for a size that no piece can have. */
export function checkPieces({ maxMemory, tile, window }: VaePieces, factor: number): void {
  if (maxMemory !== undefined && !(Number.isFinite(maxMemory) && maxMemory > 0)) {
    throw wrong('maxMemory', 'a positive number of bytes', maxMemory)
  }
  // A quarter of a tile is overlap, in pixels and in latents.
  const unit = 4 * factor
  if (tile !== undefined && !(Number.isInteger(tile) && tile > 0 && tile % unit === 0)) {
    throw wrong('tile', `a positive multiple of ${unit} pixels`, tile)
  }
  if (window !== undefined && !(Number.isInteger(window) && window > 0)) {
    throw wrong('window', 'a whole number of latent frames, 1 or more', window)
  }
}

/** What is to be cut, in latents of `factor` pixels a side. */
export interface ClipSize {
  frames: number
  height: number
  width: number
  factor: number
  /** Whether it begins a clip. */
  initial: boolean
  /** Tiles that were chosen before and cannot change. */
  tile?: number | null | undefined
}

/**
 * The largest pieces whose `estimate` (bytes) is within the budget.
 * @throws ERR_MEMORY when not even the smallest fit; ERR_OPTION as {@link checkPieces}.
 */
export function choosePieces(
  pieces: VaePieces,
  clip: ClipSize,
  estimate: (plan: VaePlan) => number,
): VaePlan {
  checkPieces(pieces, clip.factor)
  const { maxMemory, tile, window } = pieces
  if (maxMemory === undefined) return { tile: clip.tile ?? tile ?? null, window: window ?? null }
  const side = Math.max(clip.height, clip.width) * clip.factor
  const unit = 4 * clip.factor
  const smaller = TILES.filter((t) => t < side && t % unit === 0)
  const tiles = clip.tile !== undefined ? [clip.tile] : tile ? [tile] : [null, ...smaller]
  const rest = clip.frames - (clip.initial ? 1 : 0)
  const windows = window ? [window] : [null, ...WINDOWS.filter((w) => w < rest)]
  let least = Number.POSITIVE_INFINITY
  for (const t of tiles) {
    for (const w of windows) {
      const plan = { tile: t, window: w }
      const bytes = estimate(plan)
      if (bytes <= maxMemory) return plan
      least = Math.min(least, bytes)
    }
  }
  throw new PyraflowError('ERR_MEMORY', {
    what: 'maxMemory of the VAE',
    expected: `at least ${Math.ceil(least)} bytes for a clip of this size in its smallest pieces`,
    received: `${maxMemory}`,
    remedy: 'Allow more memory, use bf16, or make the clip smaller.',
  })
}

/** Frames of each chunk of a clip, the first of which has one more, or of what continues a clip. */
export function chunkLengths(frames: number, window: number | null, initial = true): number[] {
  if (window === null) return [frames]
  const lengths: number[] = []
  for (let left = frames; left > 0; ) {
    const length = Math.min(left, window + (initial && lengths.length === 0 ? 1 : 0))
    lengths.push(length)
    left -= length
  }
  return lengths
}

/** {@link chunkLengths} of a clip of 1 + factor·m pixel frames. */
export function pixelLengths(frames: number, plan: VaePlan, factor: number): number[] {
  const latents = chunkLengths((frames - 1) / factor + 1, plan.window)
  return latents.map((n, i) => n * factor - (i === 0 ? factor - 1 : 0))
}

/** A clip as a network sees it: shape [B, C, T, H, W], cut into tiles and chunks. */
export interface PlannedClip {
  shape: readonly number[]
  grid: TileGrid | null
  /** Frames of each chunk. */
  lengths: readonly number[]
  /** Whether the first chunk begins the clip, and whether all tiles carry frames on to a later call. */
  initial: boolean
  stream: boolean
  /** As in `Estimate`. */
  borrowed: Estimate['borrowed']
}

/** Most elements alive at once, weights and the clip itself not counted, result and carried frames included. */
export function estimateElements(network: VaeNetwork, clip: PlannedClip): number {
  const { grid, lengths, stream, borrowed } = clip
  const [b, c, , height, width] = clip.shape as [number, number, number, number, number]
  const cut = isCut(grid, height, width)
  const [h, w] = cut ? [Math.min(grid.size, height), Math.min(grid.size, width)] : [height, width]
  const columns = cut ? tileStarts(width, grid.step).length : 1
  const tiles = cut ? columns * tileStarts(height, grid.step).length : 1
  const carry = stream || lengths.length > 1
  const chunk = (frames: number, initial: boolean) =>
    network.footprint([b, frames, h, w, c], { carry, initial, borrowed })
  const first = chunk(lengths[0] as number, clip.initial)
  const later = lengths.length > 1 ? chunk(lengths[1] as number, false) : first
  const past = Math.max(first.past, later.past) * (stream ? tiles : 1)
  const tile = sizeOf(first.out) + (lengths.length - 1) * sizeOf(later.out)
  const whole = (tile * height * width) / (h * w)
  // Finished rows wait for the others; two rows of tiles and what a seam takes are there besides.
  const waiting = cut ? (2 * columns + 4) * tile : 0
  const results = cut || lengths.length > 1 ? whole : 0
  const input = sizeOf(clip.shape) * (cut ? 2 : 1)
  return input + Math.max(Math.max(first.peak, later.peak) + results + waiting, 2 * whole + waiting) + past
}

function wrong(what: string, expected: string, received: unknown): PyraflowError {
  return new PyraflowError('ERR_OPTION', { what: `VAE: ${what}`, expected, received: String(received) })
}
