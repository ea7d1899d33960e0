import { type ClipLayout, type LatentLayout, type Layout, placeColumns, predictionOf } from './layout.ts'

/** Neighbouring tokens that stay neighbours. */
export interface Run {
  /** Where they are in the layout's joint order, text first. */
  readonly from: number
  readonly to: number
  readonly count: number
}

/**
 * The tokens of a layout with those of every column's last clip, the current ones, in front: what a network call gets that
 * computes those alone and takes keys and values of all others from an earlier call.
 */
export interface CurrentTokens {
  /** The current tokens by themselves. */
  readonly placed: LatentLayout
  /** Rows of the current tokens; segment, order and rotation of all: current, history, text. */
  readonly tokens: Pick<
    Layout,
    'textTokens' | 'latentTokens' | 'jointRows' | 'segment' | 'order' | 'jointCos' | 'jointSin'
  >
  /** Latent tokens, which are in front of text: current ones and history. */
  readonly latents: number
  /** Where history and text come from. */
  readonly past: readonly Run[]
}

/** Puts a layout's current tokens in front. Pauses now and then: rotations of long histories are some megabytes. */
export function* currentTokens(layout: Layout): Generator<void, CurrentTokens> {
  const { batch, textTokens, latentTokens, predictionTokens } = layout
  const place = (c: number, b: number, token: number): number =>
    textTokens + layout.latentIndexOf(c, b, token)
  const current: Run[] = []
  const past: Run[] = []
  const put = (runs: Run[], from: number, count: number): void => {
    const last = runs.at(-1) ?? current.at(-1)
    runs.push({ from, to: last ? last.to + last.count : 0, count })
  }
  const eachSequence = (visit: (c: number, b: number) => void): void => {
    for (const c of layout.columns.keys()) for (let b = 0; b < batch; b++) visit(c, b)
  }
  eachSequence((c, b) => {
    const { offset, count } = predictionTokens[c]
    put(current, place(c, b, offset), count)
  })
  eachSequence((c, b) => {
    const { offset } = predictionTokens[c]
    if (offset > 0) put(past, place(c, b, 0), offset)
  })
  if (textTokens > 0) put(past, 0, textTokens)

  const runs = [...current, ...past]
  const gather = <A extends Int32Array | Float32Array>(from: A, to: A, each: number): A => {
    for (const run of runs)
      to.set(from.subarray(run.from * each, (run.from + run.count) * each), run.to * each)
    return to
  }
  const half = layout.jointCos.length / layout.segment.length
  const rows = gather(layout.jointRows, new Int32Array(layout.jointRows.length), 1)
  const columns = placeColumns(
    layout.columns.map(({ clips }) => ({ clips: clips.slice(-1) })),
    batch,
  ).map((column, c) => {
    const { firstTime } = layout.columns[c].clips.at(-1) as ClipLayout
    return { ...column, clips: column.clips.map((clip) => ({ ...clip, firstTime })) }
  })
  const count = current.reduce((n, run) => n + run.count, 0)
  yield
  const jointCos = gather(layout.jointCos, new Float32Array(layout.jointCos.length), half)
  yield
  const jointSin = gather(layout.jointSin, new Float32Array(layout.jointSin.length), half)
  yield
  return {
    placed: { latentTokens: count, batch, columns, predictionTokens: columns.map(predictionOf) },
    tokens: {
      textTokens: 0,
      latentTokens: count,
      jointRows: rows.subarray(0, count),
      segment: gather(layout.segment, new Int32Array(layout.segment.length), 1),
      order: gather(layout.order, new Int32Array(layout.order.length), 1),
      jointCos,
      jointSin,
    },
    latents: latentTokens,
    past,
  }
}
