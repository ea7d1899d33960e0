import { uniformStream } from '../../lib/tensor/shuffle.ts'

export type Rgb = readonly [number, number, number]
export type Colour = 'red' | 'yellow' | 'green' | 'cyan' | 'blue' | 'magenta'
export type Background = 'black' | 'grey' | 'white'
export type Shape = 'circle' | 'square' | 'triangle' | 'cross'
export type Motion = 'left' | 'right' | 'up' | 'down' | 'still'

/** Six hues 60° apart: hue survives blur and fading, so a scorer can still tell them apart. */
export const COLOURS: Readonly<Record<Colour, Rgb>> = {
  red: [222, 40, 40],
  yellow: [232, 222, 40],
  green: [40, 200, 50],
  cyan: [40, 210, 222],
  blue: [44, 60, 226],
  magenta: [222, 44, 212],
}

/** Colours by name, e.g. of a world that was extended. */
export type Palette = Readonly<Record<string, Rgb>>

export const BACKGROUNDS: Readonly<Record<Background, Rgb>> = {
  black: [14, 14, 14],
  grey: [128, 128, 128],
  white: [240, 240, 240],
}

export const SHAPES: readonly Shape[] = ['circle', 'square', 'triangle', 'cross']
export const MOTIONS: readonly Motion[] = ['left', 'right', 'up', 'down', 'still']

export const COLOUR_NAMES = Object.keys(COLOURS) as Colour[]
export const BACKGROUND_NAMES = Object.keys(BACKGROUNDS) as Background[]

export const SIZE = 128
export const FRAMES = 25
export const FPS = 24

/** Room between a shape and the border, so that the border always shows the background. */
const margin = 4
const minRadius = 20
const maxRadius = 28
const minTravel = 28
const maxTravel = 40

/** Every word a caption can hold; a text encoder for this world needs no others. */
export const VOCABULARY: string[] = [
  ...['a', 'on', 'background', 'moving', 'standing'],
  ...COLOUR_NAMES,
  ...SHAPES,
  ...MOTIONS,
  ...BACKGROUND_NAMES,
]

/** One clip, completely: sizes in pixels, `x`,`y` the centre in the first frame, `travel` over the whole clip. */
export interface ClipSpec {
  colour: Colour
  shape: Shape
  motion: Motion
  background: Background
  /** Half the width of the bounding box. */
  radius: number
  x: number
  y: number
  travel: number
}

/** A clip in a colour that the world does not have. */
export type ForeignClip = Omit<ClipSpec, 'colour'> & { colour: string; rgb: Rgb }

export type Split = 'train' | 'heldout' | 'all'

/**
 * Whether a combination is never trained on: 30 of the 120. Every colour-motion pair misses exactly one shape and every
 * pair of words is seen in training, so what is held out is only the combination of all three.
 */
export function isHeldOut({ colour, shape, motion }: Pick<ClipSpec, 'colour' | 'shape' | 'motion'>): boolean {
  return (COLOUR_NAMES.indexOf(colour) + SHAPES.indexOf(shape) + MOTIONS.indexOf(motion)) % 4 === 0
}

/** All combinations of colour, shape and motion of a split, in a fixed order. */
export function combinations(split: Split): Pick<ClipSpec, 'colour' | 'shape' | 'motion'>[] {
  const all = COLOUR_NAMES.flatMap((colour) =>
    SHAPES.flatMap((shape) => MOTIONS.map((motion) => ({ colour, shape, motion }))),
  )
  return split === 'all' ? all : all.filter((combination) => isHeldOut(combination) === (split === 'heldout'))
}

/** A generator of numbers in [0, 1) for `randomSpec`; the same seed gives the same clips everywhere. */
export function makeRng(seed: number): () => number {
  return uniformStream(seed)
}

/**
 * Draws a clip of the split; the shape stays inside the picture and it moves at least a fifth of the picture's width.
 *
 * @param often - how many times as often as others a shape is drawn, a whole number; 1 for those that are not named
 */
export function randomSpec(
  rng: () => number,
  split: Split,
  often: Partial<Record<Shape, number>> = {},
): ClipSpec {
  const pick = <T>(items: readonly T[]): T => items[Math.floor(rng() * items.length)] as T
  const between = (low: number, high: number): number => low + rng() * (high - low)
  const combination = pick(
    combinations(split).flatMap((c) => new Array(often[c.shape] ?? 1).fill(c) as (typeof c)[]),
  )
  const background = pick(BACKGROUND_NAMES)
  const radius = between(minRadius, maxRadius)
  const travel = combination.motion === 'still' ? 0 : between(minTravel, maxTravel)
  const low = margin + radius
  const high = SIZE - margin - radius
  const across = between(low, high)
  const forward = between(low, high - travel)
  const backward = between(low + travel, high)
  const [x, y] = {
    left: [backward, across],
    right: [forward, across],
    up: [across, backward],
    down: [across, forward],
    still: [across, forward],
  }[combination.motion] as [number, number]
  return { ...combination, background, radius, x, y, travel }
}

/** "a red circle moving right on a grey background", "a red circle standing still on a grey background". */
export function caption({
  colour,
  shape,
  motion,
  background,
}: Omit<ClipSpec | ForeignClip, 'radius' | 'x' | 'y' | 'travel'>): string {
  const verb = motion === 'still' ? 'standing' : 'moving'
  return `a ${colour} ${shape} ${verb} ${motion} on a ${background} background`
}

/**
 * Signed distance in pixels from the outline of a shape centred at 0 (negative inside). The bounding box is
 * 2·radius wide for every shape, so that size does not give the shape away.
 */
export function signedDistance(shape: Shape, radius: number, x: number, y: number): number {
  const ax = Math.abs(x)
  const ay = Math.abs(y)
  switch (shape) {
    case 'circle':
      return Math.hypot(x, y) - radius
    case 'square':
      return Math.max(ax, ay) - radius
    case 'triangle': {
      // Point up, base on the lower edge of the box; the slanted sides fall by 2 for every 1 across.
      const side = (2 * ax - (y + radius)) / Math.sqrt(5)
      return Math.max(side, y - radius)
    }
    case 'cross': {
      const arm = radius / 3
      return Math.min(Math.max(ax - radius, ay - arm), Math.max(ay - radius, ax - arm))
    }
  }
}

/** Velocity of the centre in pixels per frame. */
export function velocity({ motion, travel }: Pick<ClipSpec, 'motion' | 'travel'>): readonly [number, number] {
  const step = travel / (FRAMES - 1)
  return {
    left: [-step, 0] as const,
    right: [step, 0] as const,
    up: [0, -step] as const,
    down: [0, step] as const,
    still: [0, 0] as const,
  }[motion]
}

/** Draws a clip with antialiased edges: u8 RGB, [25, 128, 128, 3]. */
export function renderClip(spec: ClipSpec | ForeignClip): Uint8Array {
  const { shape, radius } = spec
  const colour = 'rgb' in spec ? spec.rgb : COLOURS[spec.colour]
  const background = BACKGROUNDS[spec.background]
  const frameBytes = SIZE * SIZE * 3
  const out = new Uint8Array(FRAMES * frameBytes)
  for (let i = 0; i < frameBytes; ++i) out[i] = background[i % 3]
  for (let t = 1; t < FRAMES; ++t) out.copyWithin(t * frameBytes, 0, frameBytes)
  const [vx, vy] = velocity(spec)
  for (let t = 0; t < FRAMES; ++t) {
    const cx = spec.x + vx * t
    const cy = spec.y + vy * t
    const [x0, x1, y0, y1] = [cx - radius - 1, cx + radius + 1, cy - radius - 1, cy + radius + 1]
    for (let y = Math.max(0, Math.floor(y0)); y <= Math.min(SIZE - 1, Math.ceil(y1)); ++y) {
      for (let x = Math.max(0, Math.floor(x0)); x <= Math.min(SIZE - 1, Math.ceil(x1)); ++x) {
        const distance = signedDistance(shape, radius, x + 0.5 - cx, y + 0.5 - cy)
        // A pixel's coverage is close to linear in the distance of its centre from the outline.
        const cover = Math.min(1, Math.max(0, 0.5 - distance))
        if (cover === 0) continue
        const at = t * frameBytes + (y * SIZE + x) * 3
        for (let c = 0; c < 3; ++c) {
          const [front, back] = [colour[c], background[c]]
          out[at + c] = Math.round(back + cover * (front - back))
        }
      }
    }
  }
  return out
}
