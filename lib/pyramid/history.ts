import { PyraflowError } from '../engine/errors.ts'
import { checkPositive } from './units.ts'

/** A run of earlier frames and the pyramid level at which the current unit sees it; 0 is the lowest. */
export interface HistoryPiece {
  readonly firstFrame: number
  readonly frameCount: number
  readonly level: number
}

/** Latent tokens of one network call. */
export interface TokenCount {
  readonly history: number
  readonly current: number
  readonly total: number
}

/**
 * Which earlier frames unit `unit` sees at stage `stage`, and at which resolution, oldest first (eq. 29).
 * The last unit comes at the stage's own level, each older one a level lower; level 0 never takes a
 * single unit but everything older at once, as one piece. Holds for t2v and i2v alike, since both have
 * 1 + (unit − 1)·f frames before unit `unit`, and for training with u = m − 1 units of history (§8.5).
 *
 * With a window of n units, later units see what unit n + 1 would: the first frame and the n units before them. What lies
 * between is left out, and so are its positions in time.
 *
 * @throws PyraflowError `ERR_OPTION` for a stage outside the pyramid, a unit below 0 or a window below 1.
 */
export function planHistory(
  unit: number,
  stage: number,
  stageCount: number,
  framesPerUnit = 1,
  window?: number,
): readonly HistoryPiece[] {
  checkPlace(unit, stage, stageCount)
  checkPositive('framesPerUnit', framesPerUnit)
  if (window !== undefined) checkPositive('historyWindow', window)
  if (unit === 0) return Object.freeze([])
  if (window === undefined || unit <= window + 1) return wholeHistory(unit, stage, framesPerUnit)
  const out = (unit - window - 1) * framesPerUnit
  const pieces = wholeHistory(window + 1, stage, framesPerUnit).flatMap((piece) => {
    const { firstFrame, frameCount, level } = piece
    if (firstFrame > 0) return [{ ...piece, firstFrame: firstFrame + out }]
    const first = { firstFrame: 0, frameCount: 1, level }
    return frameCount === 1 ? [first] : [first, { firstFrame: 1 + out, frameCount: frameCount - 1, level }]
  })
  return Object.freeze(pieces.map((piece) => Object.freeze(piece)))
}

function wholeHistory(unit: number, stage: number, framesPerUnit: number): readonly HistoryPiece[] {
  const total = 1 + (unit - 1) * framesPerUnit
  const pieces: HistoryPiece[] = []
  // Frames [total − back·f, total − (back − 1)·f), clamped: the oldest unit is the single first frame.
  const take = (back: number, level: number): void => {
    const firstFrame = Math.max(total - back * framesPerUnit, 0)
    const frameCount = total - (back - 1) * framesPerUnit - firstFrame
    pieces.push(Object.freeze({ firstFrame, frameCount, level }))
  }
  let back = 1
  let level = stage
  take(back, level)
  while (back < unit) {
    level = Math.max(level - 1, 0)
    if (level === 0) break
    back++
    take(back, level)
  }
  if (level === 0 && back < unit) {
    pieces.push(Object.freeze({ firstFrame: 0, frameCount: total - back * framesPerUnit, level: 0 }))
  }
  return Object.freeze(pieces.reverse())
}

/** Height and width at pyramid level `level` of a latent of `height`×`width` (floor halving, eq. 1, 3). */
export function levelSize(
  height: number,
  width: number,
  level: number,
  stageCount: number,
): { readonly height: number; readonly width: number } {
  const halvings = stageCount - 1 - level
  return { height: Math.floor(height / 2 ** halvings), width: Math.floor(width / 2 ** halvings) }
}

/**
 * Latent tokens that unit `unit` costs at stage `stage` (eq. 30), text not counted. `height` and `width`
 * are those of the full-resolution latent; the network cuts 2×2 patches.
 *
 * @throws PyraflowError as {@link planHistory} does.
 */
export function historyTokens(options: {
  readonly unit: number
  readonly stage: number
  readonly stageCount?: number
  readonly framesPerUnit?: number
  readonly window?: number | undefined
  readonly height: number
  readonly width: number
}): TokenCount {
  const { unit, stage, stageCount = 3, framesPerUnit = 1, window, height, width } = options
  const perFrame = (level: number): number => frameTokens(height, width, level, stageCount)
  let history = 0
  for (const piece of planHistory(unit, stage, stageCount, framesPerUnit, window)) {
    history += piece.frameCount * perFrame(piece.level)
  }
  const current = (unit === 0 ? 1 : framesPerUnit) * perFrame(stage)
  return Object.freeze({ history, current, total: history + current })
}

/** Tokens of one frame at a pyramid level: a quarter of its latent positions. */
export function frameTokens(height: number, width: number, level: number, stageCount: number): number {
  const size = levelSize(height, width, level, stageCount)
  return Math.floor(size.height / 2) * Math.floor(size.width / 2)
}

/**
 * Pairs of tokens of one sequence in which one sees the other: text sees itself and the first frame, a frame itself,
 * text and what was before (spec/dit-flux.md eq. 9); without causality everything sees everything. `frames` are the
 * tokens of each frame, oldest first.
 */
export function visiblePairs(text: number, frames: readonly number[], causal: boolean): number {
  const all = frames.reduce((a, b) => a + b, text)
  if (!causal) return all * all
  let seen = text
  let pairs = text * (text + (frames[0] ?? 0))
  for (const tokens of frames) {
    seen += tokens
    pairs += tokens * seen
  }
  return pairs
}

function checkPlace(unit: number, stage: number, stageCount: number): void {
  checkPositive('stageCount', stageCount)
  const ok = Number.isSafeInteger(unit) && unit >= 0 && Number.isSafeInteger(stage) && stage >= 0
  if (ok && stage < stageCount) return
  throw new PyraflowError('ERR_OPTION', {
    what: 'history of a unit',
    expected: `a unit from 0 and a stage from 0 to ${stageCount - 1}`,
    received: `unit ${unit}, stage ${stage}`,
    remedy: 'Stages are counted from 0, the lowest resolution',
  })
}
