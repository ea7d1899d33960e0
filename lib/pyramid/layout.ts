import { PyraflowError } from '../engine/errors.ts'
import { fillPositions, fillRotations } from './positions.ts'

export { gridPositions } from './positions.ts'

/** Latent size of one clip, before patching. */
export interface ClipSize {
  readonly frames: number
  readonly height: number
  readonly width: number
}

/** One column of a packed call: its clips oldest first, the last the noisy one. */
export interface Column {
  readonly clips: readonly ClipSize[]
}

/** What a packed network call contains. */
export interface LayoutOptions {
  readonly columns: readonly Column[]
  /** bs, sequences per column; 2B under guidance. */
  readonly batch: number
  /** S_t, text tokens of a row. */
  readonly textLength: number
  /** [R, S_t], 1 for a token and 0 for padding, nested or flat; absent when nothing is padded. */
  readonly textMask?: ArrayLike<number> | readonly ArrayLike<number>[] | undefined
  /** Head channels of each rotary axis: [time, y, x], or [time] alone; each even. */
  readonly headAxes: readonly number[]
  /** Whether a frame sees no later frame (eq. 9). */
  readonly causal: boolean
}

/** Where one clip's tokens are: sequence b's token i is row `rowOffset + b·rowStride + i`. */
export interface ClipLayout extends ClipSize {
  readonly tokens: number
  /** Time index of its first frame. */
  readonly firstTime: number
  readonly rowOffset: number
  readonly rowStride: number
}

/** One column's place among the latent tokens. */
export interface ColumnLayout {
  /** L_c, tokens of one sequence. */
  readonly tokens: number
  /** Row of the first token of sequence 0. */
  readonly rowOffset: number
  readonly clips: readonly ClipLayout[]
}

/** The tokens of a column whose velocity is wanted: those of its last clip. */
export interface PredictionTokens {
  /** First of them within its sequence. */
  readonly offset: number
  readonly count: number
  /** Latent size of the last clip. */
  readonly frames: number
  readonly height: number
  readonly width: number
  /** As in {@link ClipLayout}, for reading the clip back. */
  readonly rowOffset: number
  readonly rowStride: number
}

/** Where latent tokens are. */
export interface LatentLayout {
  /** N. */
  readonly latentTokens: number
  /** bs. */
  readonly batch: number
  readonly columns: readonly ColumnLayout[]
  readonly predictionTokens: readonly PredictionTokens[]
}

/**
 * The token layout of one packed network call: plain numbers, made once for a stage and used by every
 * step. There is no padding: latent tokens of all sequences form one [N, d] matrix, ordered by column c,
 * then sequence b, then clip, then (t, y, x). Text tokens form [R·S_t, d], ordered by row r = b·C + c.
 * Attention runs over all text tokens followed by all latent tokens, and token i sees token j iff
 * `segment[i] == segment[j] && order[i] >= order[j]`.
 */
export interface Layout extends LatentLayout {
  /** R·S_t. */
  readonly textTokens: number
  readonly textLength: number
  /** R = bs·C, rows of conditioning. */
  readonly rows: number
  readonly causal: boolean
  /** Conditioning row of each latent token, [N]. */
  readonly latentRows: Int32Array
  /** Conditioning row of each text token, [R·S_t]. */
  readonly textRows: Int32Array
  /** Both, text first. */
  readonly jointRows: Int32Array
  /** 2r for a token of row r, 2r + 1 for a padded text token of it, [R·S_t + N]. */
  readonly segment: Int32Array
  /** Time index when causal, else 0; text has 0, [R·S_t + N]. */
  readonly order: Int32Array
  /** Position ids (time, y, x) of latent tokens, [N, 3]; y and x stay 0 when only time is rotated. */
  readonly ids: Float32Array
  /** Rotation of latent tokens, [N, D/2] with D the sum of headAxes. */
  readonly cos: Float32Array
  readonly sin: Float32Array
  /** Rotation of all tokens, text first and unrotated, [R·S_t + N, D/2]. */
  readonly jointCos: Float32Array
  readonly jointSin: Float32Array
  /** First latent row of clip `clip` of column `c`, for sequence 0. */
  rowOffset(c: number, clip: number): number
  /** Latent row of token `token` of sequence `b` of column `c`. */
  latentIndexOf(c: number, b: number, token: number): number
}

/**
 * Lays out a packed call (spec/dit-flux.md §2–6; the single-axis form serves spec/dit-mmdit.md §3.4).
 * The latent-only arrays are views of the joint ones.
 *
 * @throws PyraflowError `ERR_SHAPE` for sizes that do not fit 2×2 patches or a mask of another size,
 * `ERR_OPTION` for rotary axes that are odd or neither one nor three.
 */
export function makeLayout(options: LayoutOptions): Layout {
  const steps = layoutSteps(options)
  for (;;) {
    const { value, done } = steps.next()
    if (done) return value
  }
}

// Tokens between pauses: long histories take tens of milliseconds where memory is slow to come.
const SLICE = 1024

/** `makeLayout` that pauses now and then, for `sliced`. */
export function* layoutSteps(options: LayoutOptions): Generator<void, Layout> {
  const { batch, textLength, headAxes, causal } = options
  checkLayout(options)
  const rows = batch * options.columns.length
  const columns = placeColumns(options.columns, batch)
  const latentTokens = columns.reduce((n, column) => n + batch * column.tokens, 0)
  const textTokens = rows * textLength
  const half = headAxes.reduce((n, d) => n + d, 0) / 2

  const jointRows = new Int32Array(textTokens + latentTokens)
  const segment = new Int32Array(textTokens + latentTokens)
  const order = new Int32Array(textTokens + latentTokens)
  const ids = new Float32Array(latentTokens * 3)
  const jointCos = new Float32Array((textTokens + latentTokens) * half).fill(1, 0, textTokens * half)
  yield
  const jointSin = new Float32Array((textTokens + latentTokens) * half)
  const cos = jointCos.subarray(textTokens * half)
  const sin = jointSin.subarray(textTokens * half)

  const valid = maskReader(options, rows)
  for (let r = 0; r < rows; r++) {
    for (let i = 0; i < textLength; i++) {
      jointRows[r * textLength + i] = r
      // Padding lies beside its row: kernels skip blocks by the least and greatest segment in them.
      segment[r * textLength + i] = valid(r, i) ? 2 * r : 2 * r + 1
    }
  }
  for (const [c, column] of columns.entries()) {
    const { tokens, rowOffset } = column
    fillPositions(ids, column.clips, headAxes.length)
    for (let at = 0; at < tokens; at += SLICE) {
      yield
      fillRotations(cos, sin, ids, rowOffset + at, Math.min(SLICE, tokens - at), headAxes)
    }
    yield
    for (let b = 0; b < batch; b++) {
      const at = rowOffset + b * tokens
      // Every sequence of a column has the same positions; the first is computed and copied.
      if (b > 0) {
        ids.copyWithin(at * 3, rowOffset * 3, (rowOffset + tokens) * 3)
        cos.copyWithin(at * half, rowOffset * half, (rowOffset + tokens) * half)
        sin.copyWithin(at * half, rowOffset * half, (rowOffset + tokens) * half)
      }
      const r = b * columns.length + c
      jointRows.fill(r, textTokens + at, textTokens + at + tokens)
      segment.fill(2 * r, textTokens + at, textTokens + at + tokens)
      if (causal) for (let i = 0; i < tokens; i++) order[textTokens + at + i] = ids[(at + i) * 3]
    }
  }

  return Object.freeze({
    latentTokens,
    textTokens,
    textLength,
    batch,
    rows,
    causal,
    columns,
    predictionTokens: Object.freeze(columns.map(predictionOf)),
    latentRows: jointRows.subarray(textTokens),
    textRows: jointRows.subarray(0, textTokens),
    jointRows,
    segment,
    order,
    ids,
    cos,
    sin,
    jointCos,
    jointSin,
    rowOffset: (c: number, clip: number): number => columns[c].clips[clip].rowOffset,
    latentIndexOf: (c: number, b: number, token: number): number => {
      const column = columns[c]
      return column.rowOffset + b * column.tokens + token
    },
  })
}

/** Lays latent tokens end to end: column by column, sequence by sequence, clip by clip. */
export function placeColumns(columns: readonly Column[], batch: number): readonly ColumnLayout[] {
  let rowOffset = 0
  return Object.freeze(
    columns.map((column) => {
      const counts = column.clips.map((clip) => (clip.frames * clip.height * clip.width) / 4)
      const tokens = counts.reduce((n, count) => n + count, 0)
      let at = rowOffset
      let firstTime = 0
      const clips = column.clips.map((clip, j) => {
        const { frames, height, width } = clip
        const count = counts[j]
        const placed = { frames, height, width, tokens: count, firstTime, rowOffset: at, rowStride: tokens }
        at += count
        firstTime += frames
        return Object.freeze(placed)
      })
      const laid = Object.freeze({ tokens, rowOffset, clips: Object.freeze(clips) })
      rowOffset += batch * tokens
      return laid
    }),
  )
}

/** Where the tokens of a column's last clip are. */
export function predictionOf(column: ColumnLayout): PredictionTokens {
  const { frames, height, width, tokens, rowOffset, rowStride } = column.clips.at(-1) as ClipLayout
  const offset = column.tokens - tokens
  return Object.freeze({ offset, count: tokens, frames, height, width, rowOffset, rowStride })
}

function maskReader(options: LayoutOptions, rows: number): (r: number, i: number) => boolean {
  const { textMask: mask, textLength } = options
  if (mask === undefined) return () => true
  const nested = mask.length > 0 && typeof mask[0] === 'object'
  const sizes = nested ? (mask as readonly ArrayLike<number>[]).map((row) => row.length) : []
  const fits = nested
    ? mask.length === rows && sizes.every((n) => n === textLength)
    : mask.length === rows * textLength
  if (!fits) {
    throw new PyraflowError('ERR_SHAPE', {
      what: 'textMask',
      expected: `[${rows}, ${textLength}], one row per sequence of every column`,
      received: nested
        ? `${mask.length} rows of ${[...new Set(sizes)].join(' or ')}`
        : `${mask.length} values`,
      remedy: 'Row b·C + c belongs to sequence b of column c',
    })
  }
  if (nested) return (r, i) => (mask as readonly ArrayLike<number>[])[r]?.[i] !== 0
  return (r, i) => (mask as ArrayLike<number>)[r * textLength + i] !== 0
}

function checkLayout(options: LayoutOptions): void {
  const { columns, batch, textLength, headAxes } = options
  const isCount = (value: number, least: number): boolean => Number.isSafeInteger(value) && value >= least
  const fail = (what: string, expected: string, received: unknown, remedy: string): PyraflowError =>
    new PyraflowError('ERR_SHAPE', { what, expected, received: String(received), remedy })
  if (!isCount(batch, 1)) throw fail('batch', 'an integer from 1', batch, 'Pass the sequences per column')
  if (!isCount(textLength, 0)) throw fail('textLength', 'an integer from 0', textLength, 'Pass S_t')
  if (columns.length === 0 || columns.some((column) => column.clips.length === 0)) {
    throw fail('columns', 'at least one, each with a clip', 'none', 'The last clip is the noisy one')
  }
  for (const [c, { clips }] of columns.entries()) {
    for (const { frames, height, width } of clips) {
      const even = isCount(height, 2) && isCount(width, 2) && height % 2 === 0 && width % 2 === 0
      if (isCount(frames, 1) && even) continue
      throw fail(
        `clip of column ${c}`,
        'at least one frame of even height and width',
        `[${frames}, ${height}, ${width}]`,
        'Choose pixel sizes that are multiples of 8·2^K for K stages',
      )
    }
  }
  const axes = headAxes.length === 1 || headAxes.length === 3
  if (axes && headAxes.every((d) => isCount(d, 2) && d % 2 === 0)) return
  throw new PyraflowError('ERR_OPTION', {
    what: 'headAxes',
    expected: 'one (time) or three (time, y, x) even numbers',
    received: `[${headAxes.join(', ')}]`,
    remedy: 'Pass axes_dims_rope of the model configuration',
  })
}
