/** The part of a placed clip that its positions depend on. */
export interface PositionedClip {
  readonly frames: number
  readonly height: number
  readonly width: number
  readonly firstTime: number
  readonly rowOffset: number
}

/**
 * Writes the ids (time, y, x) of one sequence's tokens (spec/dit-flux.md §4) into `ids`, [N, 3].
 * Time counts frames from the oldest clip; y and x of every clip lie on the last clip's patch grid.
 * With one axis only time is written.
 */
export function fillPositions(ids: Float32Array, clips: readonly PositionedClip[], axes: number): void {
  const last = clips.at(-1) as PositionedClip
  for (const clip of clips) {
    const ys = gridPositions(clip.height / 2, last.height / 2)
    const xs = gridPositions(clip.width / 2, last.width / 2)
    let at = clip.rowOffset * 3
    for (let t = 0; t < clip.frames; t++) {
      for (const y of ys) {
        for (const x of xs) {
          ids[at] = clip.firstTime + t
          if (axes > 1) {
            ids[at + 1] = y
            ids[at + 2] = x
          }
          at += 3
        }
      }
    }
  }
}

/**
 * Where `count` samples lie on a grid of `target` integer positions (eq. 5): half-pixel interpolation,
 * clamped to the grid; the integers themselves when the sizes agree.
 */
export function gridPositions(count: number, target: number): Float64Array {
  const positions = new Float64Array(count)
  for (let i = 0; i < count; i++) {
    const at = ((i + 0.5) * target) / count - 0.5
    positions[i] = count === target ? i : Math.min(Math.max(at, 0), target - 1)
  }
  return positions
}

/**
 * Cosines and sines of `tokens` tokens from row `first` (eq. 6 and before): the pairs of all axes side by
 * side, θ_i = 10000^(−2i/D_a), angles in float64. Equal ids share one evaluation, since a grid has
 * few distinct positions and many tokens.
 */
export function fillRotations(
  cos: Float32Array,
  sin: Float32Array,
  ids: Float32Array,
  first: number,
  tokens: number,
  headAxes: readonly number[],
): void {
  const half = headAxes.reduce((n, d) => n + d, 0) / 2
  let column = 0
  headAxes.forEach((dims, axis) => {
    const pairs = dims / 2
    const known = new Map<number, { readonly cos: Float32Array; readonly sin: Float32Array }>()
    for (let row = first; row < first + tokens; row++) {
      const position = ids[row * 3 + axis]
      let angles = known.get(position)
      if (!angles) {
        angles = rotationOf(position, dims)
        known.set(position, angles)
      }
      for (let i = 0; i < pairs; i++) {
        cos[row * half + column + i] = angles.cos[i]
        sin[row * half + column + i] = angles.sin[i]
      }
    }
    column += pairs
  })
}

function rotationOf(position: number, dims: number): { cos: Float32Array; sin: Float32Array } {
  const cos = new Float32Array(dims / 2)
  const sin = new Float32Array(dims / 2)
  for (let i = 0; i < dims / 2; i++) {
    const angle = position / 10000 ** ((2 * i) / dims)
    cos[i] = Math.cos(angle)
    sin[i] = Math.sin(angle)
  }
  return { cos, sin }
}
