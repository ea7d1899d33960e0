import { PyraflowError } from '../engine/errors.ts'
import type { Weights } from '../nn/weights.ts'
import { permute, reshape } from '../ops/copy.ts'
import { embedding } from '../ops/embedding.ts'
import { linear } from '../ops/matmul.ts'
import { add, mul } from '../ops/pointwise.ts'
import { gridPositions, type LatentLayout } from '../pyramid/layout.ts'
import { scope } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'

/** Sizes of a patch embedding with a table of positions. */
export interface PatchEmbedOptions {
  readonly channels: number
  readonly width: number
  /** Patches along one side of the table. */
  readonly tableSize: number
  /** Patches along one side of the grid whose patches lie at distance 1. */
  readonly baseSize: number
  /** Whether earlier clips are placed on the last clip's grid, else each in a centred window of its own size. */
  readonly interpolate: boolean
}

/**
 * The spatial sin-cos table (spec/dit-mmdit.md §3.2 eq. 1), rows y·size + x: PE(y, x) = [E1(g_x), E1(g_y)] with
 * E1(p) = [sin(p·ω), cos(p·ω)], ω_m = 10000^(−4m/d) and g_i = i·base/size in f32.
 *
 * @param width - d, a multiple of 4
 */
export function sincosTable(size: number, base: number, width: number): Float32Array {
  const half = width / 2
  const quarter = width / 4
  const axis = new Float32Array(size * half)
  for (let i = 0; i < size; i++) {
    const p = Math.fround(i / (size / base))
    for (let m = 0; m < quarter; m++) {
      const angle = p * 10000 ** (-m / quarter)
      axis[i * half + m] = Math.sin(angle)
      axis[i * half + quarter + m] = Math.cos(angle)
    }
  }
  const at = (i: number): Float32Array => axis.subarray(i * half, (i + 1) * half)
  const table = new Float32Array(size * size * width)
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      table.set(at(x), (y * size + x) * width)
      table.set(at(y), (y * size + x) * width + half)
    }
  }
  return table
}

/** One of the four table rows that a place lies between. */
export interface Corner {
  /** Row of the table of every place, [P]. */
  readonly index: Int32Array
  /** Its share in every place, [P]. */
  readonly weight: Float32Array
}

/** Where a layout's tokens lie in the table. */
export interface Places {
  /** Corners whose share is not zero everywhere. */
  readonly corners: readonly Corner[]
  /** Place of each latent token, [N]. */
  readonly tokens: Int32Array
}

interface AxisPoint {
  readonly low: number
  readonly high: number
  /** Share of `high`. */
  readonly fraction: number
}

// Points of one axis of a clip: within the column's centred window, or within a window of its own.
function axisPoints(count: number, target: number, options: PatchEmbedOptions): AxisPoint[] {
  const { tableSize, interpolate } = options
  const window = interpolate ? target : count
  const first = Math.floor((tableSize - window) / 2)
  return Array.from(gridPositions(count, window), (at) => {
    const low = Math.floor(at)
    return { low: first + low, high: first + Math.min(low + 1, window - 1), fraction: at - low }
  })
}

/**
 * Finds the table rows of every latent token (spec/dit-mmdit.md §3.3): the centred window of the column's last clip,
 * resized bilinearly for clips of another size.
 *
 * @throws ERR_SHAPE for a grid larger than the table.
 */
export function tablePlaces(layout: LatentLayout, options: PatchEmbedOptions): Places {
  const { tableSize, interpolate } = options
  const index: number[][] = [[], [], [], []]
  const weight: number[][] = [[], [], [], []]
  const known = new Map<string, number>()
  const tokens = new Int32Array(layout.latentTokens)
  const placesOf = (count: readonly [number, number], target: readonly [number, number]): number => {
    const key = `${count} ${target}`
    const first = known.get(key) ?? (index[0] as number[]).length
    if (known.has(key)) return first
    known.set(key, first)
    const xs = axisPoints(count[1], target[1], options)
    for (const y of axisPoints(count[0], target[0], options)) {
      for (const x of xs) {
        for (let corner = 0; corner < 4; corner++) {
          const [down, right] = [corner >= 2, corner % 2 === 1]
          index[corner]?.push((down ? y.high : y.low) * tableSize + (right ? x.high : x.low))
          const share = (down ? y.fraction : 1 - y.fraction) * (right ? x.fraction : 1 - x.fraction)
          weight[corner]?.push(share)
        }
      }
    }
    return first
  }
  layout.columns.forEach(({ clips }, c) => {
    const last = clips[clips.length - 1]
    for (const clip of clips) {
      const count = [clip.height / 2, clip.width / 2] as const
      const target = [last.height / 2, last.width / 2] as const
      const [height, width] = interpolate ? target : count
      if (Math.max(height, width) > tableSize) {
        throw new PyraflowError('ERR_SHAPE', {
          what: `columns[${c}]`,
          expected: `at most ${tableSize}×${tableSize} patches, the size of the position table`,
          received: `${height}×${width}`,
        })
      }
      const first = placesOf(count, target)
      const cells = count[0] * count[1]
      for (let b = 0; b < layout.batch; b++) {
        const row = clip.rowOffset + b * clip.rowStride
        for (let i = 0; i < clip.tokens; i++) tokens[row + i] = first + (i % cells)
      }
    }
  })
  const corners = index.map((rows, k) => ({
    index: Int32Array.from(rows),
    weight: Float32Array.from(weight[k] as number[]),
  }))
  return { corners: corners.filter((corner) => corner.weight.some((share) => share !== 0)), tokens }
}

/**
 * The patch embedding of the SD3 variant (spec/dit-mmdit.md §3): packed patches [N, 4C] → tokens [N, d], a projection
 * with the weights of a convolution plus each patch's row of a fixed table.
 */
export function patchEmbed(
  w: Weights,
  options: PatchEmbedOptions,
): (patches: Tensor, layout: LatentLayout) => Tensor {
  const { channels, width, tableSize, baseSize } = options
  const table = w.get('pos_embed', [1, tableSize ** 2, width], undefined, {
    dtype: 'f32',
    buffer: true,
    values: () => sincosTable(tableSize, baseSize, width),
  })
  // Xavier for the layer that the convolution is: 4C inputs of every patch.
  const uniform = Math.sqrt(6 / (4 * channels + width))
  const weight = w.get('proj.weight', [width, channels, 2, 2], { uniform })
  const bias = w.get('proj.bias', [width], 'zeros')

  // Every step of a stage comes with the same layout.
  const known = new WeakMap<LatentLayout, Places>()
  const placesOf = (layout: LatentLayout): Places => {
    const places = known.get(layout) ?? tablePlaces(layout, options)
    known.set(layout, places)
    return places
  }
  const positions = (layout: LatentLayout): Tensor =>
    scope(() => {
      const { corners, tokens } = placesOf(layout)
      const rows = table.view([tableSize ** 2, width])
      const parts = corners.map((corner) => {
        const share = Tensor.from(corner.weight, [corner.weight.length, 1])
        return mul(embedding(rows, Tensor.from(corner.index)), share)
      })
      return embedding(
        parts.reduce((a, b) => add(a, b)),
        Tensor.from(tokens),
      ) // [N, d]
    })
  return (patches, layout) => {
    // The convolution counts (channel, y, x) within a patch, packed patches (y, x, channel).
    const flat = reshape(permute(weight, [0, 2, 3, 1]), [width, 4 * channels])
    return add(linear(patches, flat, bias), positions(layout))
  }
}
