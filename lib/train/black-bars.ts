/** Rows and columns of black around the picture, in pixels of the frames looked at. */
export interface Bars {
  readonly top: number
  readonly bottom: number
  readonly left: number
  readonly right: number
}

// Levels of 255 that count as black: bars of video are 16 of 235, and coding blurs them.
const BLACK = 24
// Share of a line that must be lit for an edge to be that of a picture: things before a dark ground have no such edge.
const EDGE = 0.6
// Share of the side that a bar takes at least.
const LEAST = 0.02
// Frames looked at; more do not change the outcome.
const FRAMES = 8

/**
 * Bars at the sides of u8 RGB frames [count, height, width, 3]: lines that stay black in every frame, up to a straight edge
 * behind which most of a line is lit. Null where there are none, or nothing but black.
 */
export function findBars(
  frames: Uint8Array,
  { width, height, count }: { width: number; height: number; count: number },
): Bars | null {
  const lit = new Uint8Array(width * height)
  const step = Math.max(1, Math.floor(count / FRAMES))
  for (let t = 0; t < count; t += step) {
    for (let i = 0, at = t * width * height * 3; i < lit.length; i++, at += 3) {
      const brightest = Math.max(frames[at] as number, frames[at + 1] as number, frames[at + 2] as number)
      if (brightest > BLACK) lit[i] = 1
    }
  }
  const rows = new Float64Array(height)
  const columns = new Float64Array(width)
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      rows[y] = (rows[y] as number) + (lit[y * width + x] as number)
      columns[x] = (columns[x] as number) + (lit[y * width + x] as number)
    }
  }
  const [top, bottom] = [bar(rows, columns), bar(rows.slice().reverse(), columns)]
  const [left, right] = [bar(columns, rows), bar(columns.slice().reverse(), rows)]
  return top + bottom + left + right > 0 ? { top, bottom, left, right } : null
}

/** Length of the bar that `lines` begin with. A line is only as long as the picture between the bars of the other sides. */
function bar(lines: Float64Array, across: Float64Array): number {
  const length = across.reduce((n, lit) => n + (lit > 0 ? 1 : 0), 0)
  // One coded pixel in a hundred may be off.
  const first = lines.findIndex((lit) => lit > length / 100)
  if (first <= 0 || first < LEAST * lines.length) return 0
  // The first line may be half bar, half picture.
  const edge = Math.max(lines[first] as number, lines[first + 1] ?? 0)
  return edge >= EDGE * length ? first : 0
}
