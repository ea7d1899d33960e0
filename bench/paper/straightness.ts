import type { Stages } from '../../lib/flow/stages.ts'
import type { SampledNetwork } from '../../lib/sample/stage-run.ts'
import type { Tensor } from '../../lib/tensor/tensor.ts'
import { sample, unseenLatents } from './sampling.ts'
import type { World } from './world.ts'

const STEPS = 8

const meanSquare = (values: Float32Array): number => values.reduce((n, v) => n + v * v, 0) / values.length

/**
 * How far the path of a stage is from its chord: with few steps a straight path ends where many steps end. Mean square of
 * the difference between a stage taken in one Euler step and in eight, relative to the chord of the eight.
 */
export async function straightness(
  world: World,
  model: SampledNetwork,
  count: number,
  stages: Stages,
): Promise<number> {
  const { latents, captions } = unseenLatents(world, count)
  latents.dispose()
  const ends = async (last: number): Promise<{ began: Float32Array; ended: Float32Array }> => {
    let found: { began: Float32Array; ended: Float32Array } = {
      began: new Float32Array(),
      ended: new Float32Array(),
    }
    const steps = stages.start.map((_, k) => (k === stages.count - 1 ? last : STEPS))
    const onStage = async (stage: number, began: Tensor, ended: Tensor): Promise<void> => {
      if (stage < stages.count - 1 || found.began.length > 0) return
      found = { began: await began.floats(), ended: await ended.floats() }
    }
    const made = await sample(world, model, captions, { stages, steps, frames: 1, guidance: 0 }, 9, onStage)
    made.dispose()
    return found
  }
  const [one, many] = [await ends(1), await ends(STEPS)]
  const difference = one.ended.map((v, i) => v - (many.ended[i] as number))
  const chord = many.ended.map((v, i) => v - (many.began[i] as number))
  return meanSquare(difference) / meanSquare(chord)
}
