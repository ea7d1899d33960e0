import { guidanceForUnit, guidedSteps } from '../flow/guidance.ts'
import type { Pipeline } from '../pipeline.ts'
import { frameTokens, historyTokens, planHistory, visiblePairs } from '../pyramid/history.ts'
import { unitsForFrames } from '../pyramid/units.ts'
import type { Recipe } from './recipe.ts'

/** Tokens of the network calls of one unit in one stage; where guidance ends within it, of those before, or after. */
export interface UnitTokens {
  readonly unit: number
  readonly stage: number
  /** Euler steps, each of which is a call. */
  readonly steps: number
  /** Of these, the calls that take text and history as an earlier one left them, and compute `current` alone. */
  readonly kept: number
  /** Sequences of a call: 2 under guidance, else 1. */
  readonly sequences: number
  /** Of one sequence: earlier frames, the unit itself, and text. */
  readonly history: number
  readonly current: number
  readonly text: number
  /** Of all sequences. */
  readonly total: number
  /** Pairs of one sequence in which a token sees another. */
  readonly pairs: number
  /** Of these, the pairs in which a token of the unit sees another. */
  readonly currentPairs: number
}

/**
 * Tokens of every unit and stage that are to be made, in order: of a video by itself, or of one of `frames` latent frames
 * of which the first `given` are there.
 */
export function unitTokens(
  pipeline: Pipeline,
  recipe: Recipe,
  part: { readonly frames?: number; readonly given?: number } = {},
): UnitTokens[] {
  const { config, stages, vae, text, transformer } = pipeline
  const { frames = (recipe.frames - 1) / vae.temporalFactor + 1, given = 0 } = part
  const framesPerUnit = config.framesPerUnit ?? 1
  const size = { height: recipe.height / vae.spatialFactor, width: recipe.width / vae.spatialFactor }
  const guidance = {
    guidanceScale: recipe.guidanceScale,
    videoGuidanceScale: recipe.videoGuidanceScale,
    linear: recipe.linearGuidance,
    perUnit: recipe.guidance,
  }
  const units = unitsForFrames(frames, { framesPerUnit }).filter(({ firstFrame }) => firstFrame >= given)
  return units.flatMap(({ index: unit, frames: own }) => {
    const counts = unit === 0 ? recipe.steps : recipe.videoSteps
    const guided = guidanceForUnit(unit, guidance) > 0
    const guidedCounts = guidedSteps(counts, guided ? (recipe.guidanceStop ?? 1) : 0)
    return counts.flatMap((count, stage) => {
      const window = recipe.historyWindow
      const where = { unit, stage, stageCount: stages.count, framesPerUnit, window, ...size }
      const { history, current } = historyTokens(where)
      const per = (level: number): number => frameTokens(size.height, size.width, level, stages.count)
      const earlier = planHistory(unit, stage, stages.count, framesPerUnit, window).flatMap(
        ({ frameCount, level }) => new Array<number>(frameCount).fill(per(level)),
      )
      const frames = [...earlier, ...new Array<number>(own).fill(per(stage))]
      const causal = transformer.config.use_temporal_causal
      const pairs = visiblePairs(text.maxLength, frames, causal)
      const before = guidedCounts[stage] as number
      const parts = [
        { sequences: 2, steps: before },
        { sequences: 1, steps: count - before },
      ].filter(({ steps }) => steps > 0)
      return parts.map(({ sequences, steps }) => ({
        ...{ unit, stage, sequences, history, current, steps, pairs },
        kept: earlier.length === 0 ? 0 : steps - Math.ceil(steps / (recipe.historyCache ?? 1)),
        text: text.maxLength,
        total: sequences * (history + current + text.maxLength),
        currentPairs: earlier.length === 0 ? pairs : pairs - visiblePairs(text.maxLength, earlier, causal),
      }))
    })
  })
}

/** Multiplications and additions of a unit's steps in one stage: in the layers' products, and in attention. */
export function stageFlops(
  { transformer }: Pipeline,
  { sequences, history, current, text, pairs, currentPairs, steps, kept }: UnitTokens,
): { linear: number; attention: number } {
  const c = transformer.config as typeof transformer.config & { num_single_layers?: number }
  const d = c.num_attention_heads * c.attention_head_dim
  const single = c.num_single_layers ?? 0
  const latent = sequences * (steps * current + (steps - kept) * history)
  const words = sequences * (steps - kept) * text
  // q, k, v, output and two times four times the width in between, in both kinds of blocks.
  const blocks = 12 * d ** 2 * (c.num_layers + single) * (latent + words)
  const ends = d * (latent * 8 * transformer.latentChannels + words * c.joint_attention_dim)
  const seen = sequences * ((steps - kept) * pairs + kept * currentPairs)
  return { linear: 2 * (blocks + ends), attention: 4 * seen * d * (c.num_layers + single) }
}
