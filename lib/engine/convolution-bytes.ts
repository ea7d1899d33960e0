type Dims = readonly number[]

// conv3d/winograd_cpu.h: squares of 2 × 2 results from 4 × 4 inputs, and who gets them.
const POINTS = 16
const COLUMNS = 256
const FEWEST = { squares: 256, channels: 64 } as const
const ROWS = { few: 64, many: 128, widestSum: 768 } as const

export const product = (dims: Dims): number => dims.reduce((a, b) => a * b, 1)

/**
 * Bytes that a convolution borrows on a CPU for its weight in another order or, where that can pay, for transformed
 * filters and what its threads work in. x [B, T, H, W, C], w [O, C, kt, kh, kw], y [B, T', H', W', O]; `type` is what
 * is multiplied: bf16, f32, or bf16 widened to f32.
 */
export function convolutionBytes(
  x: Dims,
  w: Dims,
  y: Dims,
  type: 'bf16' | 'f32' | 'widened',
  threads: number,
): number {
  const size = type === 'bf16' ? 2 : 4
  const copied = (...all: Dims[]): number =>
    type === 'widened' ? 4 * all.map(product).reduce((a, b) => a + b) : 0
  const [outputs, channels, frames, high, wide] = w as [number, number, number, number, number]
  const reordered = 2 * size * product(w) + copied(x, w, y)
  const [batch, length, height, width] = y as [number, number, number, number]
  const squares = batch * length * Math.ceil(height / 2) * Math.ceil(width / 2)
  const strided = height < (x[2] as number) - 2 || width < (x[3] as number) - 2
  const narrow = Math.min(outputs, channels) < FEWEST.channels || outputs % 16 !== 0 || channels % 16 !== 0
  if (high !== 3 || wide !== 3 || strided || narrow || squares < FEWEST.squares) return reordered
  // A single frame sees no more frames than there are.
  const sum = channels * (length === 1 ? Math.min(frames, x[1] as number) : frames)
  const columns = Math.min(outputs, COLUMNS)
  const rows = sum <= ROWS.widestSum && squares >= 16 * ROWS.many ? ROWS.many : ROWS.few
  const filters = POINTS * columns * sum * size * (Math.ceil(outputs / columns) + 1)
  const block = POINTS * (rows * sum * size + 64 + 4 * (rows * columns + 16))
  return filters + threads * (block + 4 * 9 * sum) + copied(x, w)
}
