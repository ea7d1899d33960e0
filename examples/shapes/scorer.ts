import {
  BACKGROUND_NAMES,
  BACKGROUNDS,
  type Background,
  COLOURS,
  type Motion,
  type Palette,
  type Rgb,
  SHAPES,
  type Shape,
  signedDistance,
} from './world.ts'

/** What a clip shows; `none` where nothing stands out from the background. */
export interface ClipScore {
  /** A name of the palette, or `none`. */
  colour: string
  shape: Shape | 'none'
  motion: Motion | 'none'
  background: Background
  /** 0 … 1: how clearly the least certain attribute beat its runner-up. */
  confidence: number
}

export interface ClipSize {
  width: number
  height: number
  count: number
}

/** Side of the grid on which shapes are compared, in cells, and its half width in standard deviations. */
const grid = 24
const reach = 2.6
/** A foreground weaker than this (RGB distance) is noise of the decoder, not a shape. */
const minContrast = 30
/** A shape covers at least this share of the picture and at most the other. */
const minArea = 0.004
const maxArea = 0.5
/** Displacement over the clip, relative to the picture, from which on it counts as motion. */
const minMotion = 0.12
const minCorrelation = 0.6

interface Blob {
  /** Weight 0 … 1 per pixel of the largest connected foreground region. */
  mask: Float32Array
  mass: number
  x: number
  y: number
  /** Standard deviations of the mask along the axes. */
  sx: number
  sy: number
}

const clamp01 = (v: number): number => Math.min(1, Math.max(0, v))

/** Middle value per channel along the border, where no shape ever is; a median ignores what leaks into it. */
function borderColour(frame: Uint8Array, width: number, height: number): Rgb {
  const histograms = [new Uint32Array(256), new Uint32Array(256), new Uint32Array(256)]
  let n = 0
  for (let y = 0; y < height; ++y) {
    for (let x = 0; x < width; ++x) {
      if (x >= 3 && x < width - 3 && y >= 3 && y < height - 3) x = width - 3
      const at = (y * width + x) * 3
      for (let c = 0; c < 3; ++c) histograms[c][frame[at + c]]++
      ++n
    }
  }
  return histograms.map((histogram) => {
    let seen = 0
    return histogram.findIndex((count) => {
      seen += count
      return seen * 2 >= n
    })
  }) as unknown as Rgb
}

/** Keeps only the largest 4-connected region with weight ≥ ½ and its soft rim; generated frames have specks. */
function largestRegion(weight: Float32Array, width: number, height: number): Float32Array {
  const label = new Int32Array(weight.length)
  const stack = new Int32Array(weight.length)
  let best = 0
  let bestSize = 0
  let labels = 0
  for (let start = 0; start < weight.length; ++start) {
    if (weight[start] < 0.5 || label[start]) continue
    let top = 0
    let size = 0
    stack[top++] = start
    label[start] = ++labels
    while (top > 0) {
      const at = stack[--top]
      const x = at % width
      ++size
      const near = [x > 0 ? at - 1 : -1, x < width - 1 ? at + 1 : -1, at - width, at + width]
      for (const next of near) {
        if (next < 0 || next >= weight.length || label[next] || weight[next] < 0.5) continue
        label[next] = labels
        stack[top++] = next
      }
    }
    if (size > bestSize) [best, bestSize] = [labels, size]
  }
  const kept = new Float32Array(weight.length)
  if (!best) return kept
  const rim = 3
  for (let y = 0; y < height; ++y) {
    for (let x = 0; x < width; ++x) {
      if (label[y * width + x] !== best) continue
      const inner =
        x > 0 &&
        x < width - 1 &&
        y > 0 &&
        y < height - 1 &&
        label[y * width + x - 1] === best &&
        label[y * width + x + 1] === best &&
        label[(y - 1) * width + x] === best &&
        label[(y + 1) * width + x] === best
      const spread = inner ? 0 : rim
      for (let v = Math.max(0, y - spread); v <= Math.min(height - 1, y + spread); ++v) {
        for (let u = Math.max(0, x - spread); u <= Math.min(width - 1, x + spread); ++u) {
          kept[v * width + u] = weight[v * width + u]
        }
      }
    }
  }
  return kept
}

function momentsOf(mask: Float32Array, width: number): Blob {
  let mass = 0
  let mx = 0
  let my = 0
  let mxx = 0
  let myy = 0
  for (let i = 0; i < mask.length; ++i) {
    const w = mask[i]
    if (w === 0) continue
    const x = (i % width) + 0.5
    const y = Math.floor(i / width) + 0.5
    mass += w
    mx += w * x
    my += w * y
    mxx += w * x * x
    myy += w * y * y
  }
  const x = mx / mass
  const y = my / mass
  const [sx, sy] = [
    Math.sqrt(Math.max(1e-6, mxx / mass - x * x)),
    Math.sqrt(Math.max(1e-6, myy / mass - y * y)),
  ]
  return { mask, mass, x, y, sx, sy }
}

/** The foreground of one frame: how far each pixel has gone from the background towards the shape's own colour. */
function findBlob(frame: Uint8Array, width: number, height: number, back: Rgb): Blob | undefined {
  const pixels = width * height
  const distance = new Float32Array(pixels)
  const histogram = new Uint32Array(443)
  for (let i = 0; i < pixels; ++i) {
    const [r, g, b] = [frame[3 * i] - back[0], frame[3 * i + 1] - back[1], frame[3 * i + 2] - back[2]]
    const d = Math.sqrt(r * r + g * g + b * b)
    distance[i] = d
    histogram[Math.floor(d)]++
  }
  // The full contrast is what the strongest 1.5 % of pixels reach: fewer than the smallest shape covers.
  let contrast = histogram.length - 1
  for (
    let above = histogram[contrast];
    contrast > 0 && above < 0.015 * pixels;
    above += histogram[contrast]
  ) {
    --contrast
  }
  if (contrast < minContrast) return undefined
  const weight = distance.map((d) => clamp01((d / contrast - 0.2) / 0.6))
  const blob = momentsOf(largestRegion(weight, width, height), width)
  return blob.mass >= minArea * pixels && blob.mass <= maxArea * pixels ? blob : undefined
}

/** Resamples a mask so that centre and spread along both axes are standard; stretch and size then no longer matter. */
function normalised(
  sample: (x: number, y: number) => number,
  blob: Omit<Blob, 'mask' | 'mass'>,
): Float32Array {
  const out = new Float32Array(grid * grid)
  for (let j = 0; j < grid; ++j) {
    for (let i = 0; i < grid; ++i) {
      const u = ((i + 0.5) / grid - 0.5) * 2 * reach
      const v = ((j + 0.5) / grid - 0.5) * 2 * reach
      out[j * grid + i] = sample(blob.x + u * blob.sx, blob.y + v * blob.sy)
    }
  }
  return out
}

function bilinear(mask: Float32Array, width: number, height: number): (x: number, y: number) => number {
  const at = (x: number, y: number): number =>
    x < 0 || y < 0 || x >= width || y >= height ? 0 : mask[y * width + x]
  return (px, py) => {
    const [x, y] = [Math.floor(px - 0.5), Math.floor(py - 0.5)]
    const [fx, fy] = [px - 0.5 - x, py - 0.5 - y]
    const upper = at(x, y) * (1 - fx) + at(x + 1, y) * fx
    return upper * (1 - fy) + (at(x, y + 1) * (1 - fx) + at(x + 1, y + 1) * fx) * fy
  }
}

/** Each shape drawn with edges from sharp to very soft: a small decoder blurs, and blur is no other shape. */
function makeTemplates(): { shape: Shape; cells: Float32Array }[] {
  const side = 64
  const radius = 18
  return SHAPES.flatMap((shape) =>
    [1, 5, 10].map((softness) => {
      const mask = new Float32Array(side * side)
      for (let i = 0; i < mask.length; ++i) {
        const [x, y] = [(i % side) + 0.5 - side / 2, Math.floor(i / side) + 0.5 - side / 2]
        mask[i] = clamp01(0.5 - signedDistance(shape, radius, x, y) / softness)
      }
      return { shape, cells: normalised(bilinear(mask, side, side), momentsOf(mask, side)) }
    }),
  )
}

let templates: ReturnType<typeof makeTemplates> | undefined

function correlation(a: Float32Array, b: Float32Array): number {
  const mean = (v: Float32Array): number => v.reduce((sum, x) => sum + x, 0) / v.length
  const [ma, mb] = [mean(a), mean(b)]
  let [ab, aa, bb] = [0, 0, 0]
  for (let i = 0; i < a.length; ++i) {
    const [x, y] = [a[i] - ma, b[i] - mb]
    ab += x * y
    aa += x * x
    bb += y * y
  }
  return ab / Math.sqrt(aa * bb + 1e-12)
}

/** Best two of a list of named scores, higher is better. */
function rank<T>(scores: [T, number][]): { name: T; best: number; second: number } {
  const sorted = [...scores].sort((a, b) => b[1] - a[1])
  const [first, next] = [sorted[0] as [T, number], sorted[1] as [T, number]]
  return { name: first[0], best: first[1], second: next[1] }
}

const hue = ([r, g, b]: Rgb): number => Math.atan2(Math.sqrt(3) * (g - b), 2 * r - g - b)

/** Cosine between hues: fading towards grey or white and darkening leave it alone. */
function rankColour(mean: Rgb, palette: Palette): ReturnType<typeof rank<string>> {
  return rank(Object.entries(palette).map(([name, rgb]) => [name, Math.cos(hue(mean) - hue(rgb))]))
}

/** Slope of a straight line through (t, value), which a few misplaced frames hardly move. */
function slope(times: number[], values: number[]): number {
  const slopes: number[] = []
  for (let i = 0; i < times.length; ++i) {
    for (let j = i + 1; j < times.length; ++j) {
      slopes.push((values[j] - values[i]) / (times[j] - times[i]))
    }
  }
  slopes.sort((a, b) => a - b)
  return slopes[slopes.length >> 1] ?? 0
}

/**
 * Reads colour, shape, motion and background back from u8 RGB frames [count, height, width, 3]. The judge knows the
 * palette and the outlines of the world, nothing of the caption. The judge's calibration is that of the world's own colours.
 * A single picture stands still.
 */
export function scoreClip(
  frames: Uint8Array,
  { width, height, count }: ClipSize,
  palette: Palette = COLOURS,
): ClipScore {
  templates ??= makeTemplates()
  const bytes = width * height * 3
  const times: number[] = []
  const [xs, ys]: [number[], number[]] = [[], []]
  const cells = new Float32Array(grid * grid)
  const colour: [number, number, number] = [0, 0, 0]
  const border: [number, number, number] = [0, 0, 0]
  for (let t = 0; t < count; ++t) {
    const frame = frames.subarray(t * bytes, (t + 1) * bytes)
    const back = borderColour(frame, width, height)
    for (let c = 0; c < 3; ++c) border[c] = border[c] + back[c] / count
    const blob = findBlob(frame, width, height, back)
    if (!blob) continue
    times.push(t)
    xs.push(blob.x)
    ys.push(blob.y)
    const normal = normalised(bilinear(blob.mask, width, height), blob)
    for (let i = 0; i < cells.length; ++i) cells[i] = cells[i] + normal[i]
    let core = 0
    const sum: [number, number, number] = [0, 0, 0]
    for (let i = 0; i < blob.mask.length; ++i) {
      if (blob.mask[i] < 0.9) continue
      ++core
      for (let c = 0; c < 3; ++c) sum[c] = sum[c] + frame[3 * i + c]
    }
    for (let c = 0; c < 3; ++c) colour[c] = colour[c] + sum[c] / Math.max(1, core)
  }
  const backgrounds = rank(
    BACKGROUND_NAMES.map((name) => [name, -Math.hypot(...BACKGROUNDS[name].map((v, c) => v - border[c]))]),
  )
  const background = backgrounds.name
  // A shape that is gone in most frames was not drawn, whatever the rest looks like.
  if (times.length < Math.max(0.6 * count, Math.min(2, count))) {
    return { colour: 'none', shape: 'none', motion: 'none', background, confidence: 0 }
  }
  const found = rankColour(colour.map((v) => v / times.length) as unknown as Rgb, palette)
  const correlations = new Map<Shape, number>()
  for (const template of templates) {
    const value = correlation(cells, template.cells)
    correlations.set(template.shape, Math.max(value, correlations.get(template.shape) ?? -1))
  }
  const shapes = rank([...correlations])
  const dx = (slope(times, xs) * (count - 1)) / width
  const dy = (slope(times, ys) * (count - 1)) / height
  const distance = Math.max(Math.abs(dx), Math.abs(dy))
  const horizontal = Math.abs(dx) >= Math.abs(dy)
  const moving: Motion = horizontal ? (dx > 0 ? 'right' : 'left') : dy > 0 ? 'down' : 'up'
  const motion: Motion = distance < minMotion ? 'still' : moving
  const straight = motion === 'still' ? 1 : Math.abs(Math.abs(dx) - Math.abs(dy)) / distance
  const confidence = Math.min(
    clamp01((found.best - found.second) * 2),
    clamp01((shapes.best - shapes.second) * 10),
    clamp01(Math.abs(distance - minMotion) / minMotion),
    straight,
    clamp01((backgrounds.best - backgrounds.second) / 60),
  )
  const shape = shapes.best < minCorrelation ? 'none' : shapes.name
  return { colour: found.name, shape, motion, background, confidence }
}
