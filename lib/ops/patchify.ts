import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { needsGrad, record } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { expectFloats, expectShape, expectThat } from './check.ts'

/** Where a clip's tokens are: sequence b's token i is row `rowOffset + b·rowStride + i`. */
export interface TokenPlace {
  readonly rowOffset: number
  readonly rowStride: number
}

/** What packing needs of a layout (lib/pyramid/layout.ts makes them). */
export interface TokenLayout {
  /** N */
  readonly latentTokens: number
  readonly columns: readonly { readonly clips: readonly TokenPlace[] }[]
}

function checkClip(op: string, clip: Tensor, place: TokenPlace, tokens: number): void {
  const [b, , t, h, w] = clip.shape as [number, number, number, number, number]
  expectThat(h % 2 === 0 && w % 2 === 0, op, 'a clip [B, C, T, H, W] with even H and W', clip)
  const end = place.rowOffset + (b - 1) * place.rowStride + (t * h * w) / 4
  expectThat(end <= tokens, op, `a clip that ends within ${tokens} tokens from row ${place.rowOffset}`, clip)
}

/**
 * Cuts clips into 2×2 patches and places them as tokens of one matrix:
 * row(b, t, y, x) = rowOffset + b·rowStride + (t·H/2 + y)·W/2 + x, feature (p_y·2 + p_x)·C + c.
 *
 * @param columns - column → its clips [B, C, T, H, W], oldest first
 * @returns [N, 4C] in the first clip's dtype
 */
export function packTokens(columns: readonly (readonly Tensor[])[], layout: TokenLayout): Tensor {
  const clips = columns.flat()
  const places = layout.columns.flatMap((column) => column.clips)
  const first = clips[0]
  const fits = columns.length === layout.columns.length
  if (!first || !fits || columns.some((column, c) => column.length !== layout.columns[c]?.clips.length)) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'packTokens',
      expected: `clips per column (${layout.columns.map((column) => column.clips.length).join(', ')})`,
      received: `(${columns.map((column) => column.length).join(', ')})`,
    })
  }
  expectFloats('packTokens', ...clips)
  const n = layout.latentTokens
  const channels = first.shape[1] ?? 0
  clips.forEach((clip, i) => {
    expectShape('packTokens', 'a clip [B, C, T, H, W]', clip, [null, channels, null, null, null])
    checkClip('packTokens', clip, places[i] as TokenPlace, n)
  })
  const tokens = Tensor.empty([n, 4 * channels], first.dtype)
  clips.forEach((clip, i) => {
    const { rowOffset, rowStride } = places[i] as TokenPlace
    engine.run('patchify', [clip], [tokens], [rowOffset, rowStride])
  })
  const wanted = clips.map((clip) => needsGrad(clip))
  record(clips, [tokens], ([g]) =>
    clips.map((clip, i) => {
      if (!wanted[i]) return null
      const { rowOffset, rowStride } = places[i] as TokenPlace
      const dClip = Tensor.empty(clip.shape, clip.dtype)
      engine.run('unpatchify', [g as Tensor], [dClip], [rowOffset, rowStride])
      return dClip
    }),
  )
  return tokens
}

/** Options of {@link unpatchify}. */
export interface UnpatchifyOptions extends TokenPlace {
  /** [B, C, T, H, W] */
  readonly shape: readonly number[]
}

/**
 * Reads one clip back from a token matrix: the inverse of {@link packTokens} for that clip.
 *
 * @param tokens - [N, 4C]
 * @returns [B, C, T, H, W]
 */
export function unpatchify(tokens: Tensor, options: UnpatchifyOptions): Tensor {
  const { rowOffset, rowStride, shape } = options
  expectFloats('unpatchify', tokens)
  const clip = Tensor.empty(shape, tokens.dtype)
  expectShape('unpatchify', 'a clip [B, C, T, H, W]', clip, [null, null, null, null, null])
  expectShape('unpatchify', 'tokens [N, 4C]', tokens, [null, 4 * (shape[1] as number)])
  checkClip('unpatchify', clip, options, tokens.shape[0] as number)
  engine.run('unpatchify', [tokens], [clip], [rowOffset, rowStride])
  record([tokens], [clip], ([g]) => {
    const dTokens = Tensor.zeros(tokens.shape, tokens.dtype)
    engine.run('patchify', [g as Tensor], [dTokens], [rowOffset, rowStride])
    return [dTokens]
  })
  return clip
}
