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
 * behind which most of a line is lit in most frames. Null where there are none, or nothing but black.
 */
export function findBars(
  frames: Uint8Array,
  { width, height, count }: { width: number; height: number; count: number },
): Bars | null {
  const lit = new Uint8Array(width * height)
  const rows: Lines = []
  const columns: Lines = []
  const step = Math.max(1, Math.floor(count / FRAMES))
  for (let t = 0; t < count; t += step) {
    const [row, column] = [new Uint32Array(height), new Uint32Array(width)]
    for (let y = 0, at = t * width * height * 3; y < height; y++) {
      for (let x = 0; x < width; x++, at += 3) {
        const brightest = Math.max(frames[at] as number, frames[at + 1] as number, frames[at + 2] as number)
        if (brightest <= BLACK) continue
        lit[y * width + x] = 1
        row[y] = (row[y] as number) + 1
        column[x] = (column[x] as number) + 1
      }
    }
    rows.push(row)
    columns.push(column)
  }
  const [everRow, everColumn] = [new Uint32Array(height), new Uint32Array(width)]
  for (let i = 0; i < lit.length; i++) {
    if (lit[i] === 0) continue
    const [x, y] = [i % width, Math.floor(i / width)]
    everRow[y] = (everRow[y] as number) + 1
    everColumn[x] = (everColumn[x] as number) + 1
  }
  const [top, bottom] = barsAt(everRow, rows, width)
  const [left, right] = barsAt(everColumn, columns, height)
  return top + bottom + left + right > 0 ? { top, bottom, left, right } : null
}

/** Lit pixels of each line, frame by frame. */
type Lines = Uint32Array[]

/**
 * Lengths of the bars at both ends.
 *
 * @param ever - pixels of each line that are lit in any frame
 * @param length - pixels of a line; bars at the other sides may take some of them
 */
function barsAt(ever: Uint32Array, frames: Lines, length: number): [number, number] {
  // One coded pixel in a hundred may be off.
  const seen = (lit: number): boolean => lit > length / 100
  const [first, last] = [ever.findIndex(seen), ever.findLastIndex(seen)]
  // The first line may be half bar, half picture. What moves before a dark ground fills a line over time, not at once.
  const straight = (line: number, next: number): boolean => {
    const full = frames.filter((lit) => Math.max(lit[line] as number, lit[next] ?? 0) >= EDGE * length)
    return 2 * full.length >= frames.length
  }
  const bar = (size: number, line: number, next: number): number =>
    first >= 0 && size >= LEAST * ever.length && size > 0 && straight(line, next) ? size : 0
  return [bar(first, first, first + 1), bar(ever.length - 1 - last, last, last - 1)]
}
