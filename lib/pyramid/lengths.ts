import { PyraflowError } from '../engine/errors.ts'
import { checkPositive, unitsInClip } from './units.ts'

/** What decides how many units each stage trains on. */
export interface StageLengthOptions {
  /** Longest clip of the configuration, in latent frames. */
  readonly maxFrames: number
  readonly framesPerUnit?: number
  /** G, how many processes see the same videos at different lengths. */
  readonly syncGroup?: number
  readonly rank?: number
  /** Number of this training (micro-)step in this process, 1 for the first. */
  readonly counter: number
  /** Units that the current batch holds; absent for no limit. */
  readonly batchUnits?: number | undefined
  readonly stageCount?: number
}

/**
 * Units per stage for one training step, lowest stage first (spec/training.md §2, eq. 2). The highest
 * stage walks through all lengths, each process of a sync group offset by one, and every lower stage
 * takes the complementary length, so that long expensive sequences travel with short cheap ones.
 * With three stages this is exactly the published [low, mid, high]; other pyramids follow the same rule.
 *
 * @throws PyraflowError `ERR_OPTION` when the sync group is larger than the number of units.
 */
export function stageLengths(options: StageLengthOptions): readonly number[] {
  const {
    maxFrames,
    framesPerUnit = 1,
    syncGroup = 1,
    rank = 0,
    counter,
    batchUnits,
    stageCount = 3,
  } = options
  checkPositive('syncGroup', syncGroup)
  checkPositive('stageCount', stageCount)
  const units = unitsInClip(maxFrames, framesPerUnit)
  const turns = Math.floor(units / syncGroup)
  if (turns < 1) throw invalid('syncGroup', `at most ${units}, the units of the longest clip`, syncGroup)
  if (!Number.isSafeInteger(rank) || rank < 0) throw invalid('rank', 'an integer from 0', rank)
  if (!Number.isSafeInteger(counter) || counter < 0) throw invalid('counter', 'an integer from 0', counter)
  if (batchUnits !== undefined) checkPositive('batchUnits', batchUnits)

  const limit = batchUnits ?? units
  const high = Math.max((rank % syncGroup) + 1 + (counter % turns) * syncGroup, 1)
  const low = Math.max(1 + units - high, 1)
  return Object.freeze(
    Array.from({ length: stageCount }, (_, k) => Math.min(k === stageCount - 1 ? high : low, limit)),
  )
}

function invalid(what: string, expected: string, received: unknown): PyraflowError {
  return new PyraflowError('ERR_OPTION', {
    what,
    expected,
    received: String(received),
    remedy: 'Longer clips or a smaller group give every process a length of its own',
  })
}
