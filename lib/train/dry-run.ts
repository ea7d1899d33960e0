import { mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { engine } from '../engine/engine.ts'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { ioError } from '../io/atomic.ts'
import { openWeights, writeSafetensors } from '../io/safetensors.ts'
import { Generator } from '../tensor/generator.ts'
import { sliced } from '../tensor/sliced.ts'
import { backwardSteps } from '../tensor/tape.ts'
import type { Batch } from './batches.ts'
import type { LatentSource } from './latent-source.ts'
import { lossSteps, type Objective, unitsOf } from './objective.ts'
import type { AdamW } from './optimizer.ts'
import { allLengths } from './plan.ts'
import type { Resolved } from './trainer-options.ts'

/** One part of training that was gone through beforehand. */
export interface RehearsedBranch {
  /** Which part, e.g. `[16, 4, 8, 8] × 4, units [3, 3, 2]` or `checkpoint`. */
  readonly name: string
  readonly seconds: number
  /** Most bytes of tensors that the engine held meanwhile. */
  readonly peak: number
  /** Where there was one. */
  readonly loss?: number
  readonly gradNorm?: number
}

interface Parts extends Resolved {
  data: LatentSource
  out: string
  optimizer: AdamW
  seed?: number
  signal: AbortSignal | undefined
  save: (dir: string) => Promise<void>
  validate: (() => Promise<{ loss: number }>) | undefined
  sample: ((dir: string) => Promise<unknown>) | undefined
}

/** `Trainer.rehearse`. */
export async function rehearseTraining(parts: Parts): Promise<RehearsedBranch[]> {
  const { objective, batches, optimizer, out, signal, save, validate, sample } = parts
  const branches: RehearsedBranch[] = []
  const go = async (name: string, work: () => Promise<unknown>): Promise<void> => {
    throwIfAborted(signal, 'the rehearsal')
    await engine.idle()
    engine.resetPeak()
    const began = performance.now()
    const result = (await work()) as { loss?: number; gradNorm?: number } | undefined
    await engine.idle()
    const seconds = (performance.now() - began) / 1000
    const { loss, gradNorm } = result ?? {}
    const found = { ...(loss !== undefined && { loss }), ...(gradNorm !== undefined && { gradNorm }) }
    branches.push({ name, seconds, peak: engine.memory().peak, ...found })
    for (const [what, value] of Object.entries(found)) {
      if (Number.isFinite(value)) continue
      throw new PyraflowError('ERR_NUMERICS', {
        what: `rehearsal of ${name}: ${what}`,
        expected: 'a finite number',
        received: String(value),
        remedy: 'Check weights and latents, or use f32.',
      })
    }
  }
  const folder = join(out, 'rehearsal.tmp')
  try {
    for (const batch of allLengths(objective, batches.kinds())) {
      await go(nameOf(objective, batch), () => step(parts, objective, batch))
    }
    const undressed = { ...objective, captionDrop: 1 }
    const [first] = batches.kinds() as [Batch]
    await go(`${nameOf(objective, first)}, without captions`, () => step(parts, undressed, first))
    if (validate) await go('validation', validate)
    await mkdir(folder, { recursive: true }).catch((error: unknown) => {
      throw ioError(error, 'make folder of the rehearsal', folder)
    })
    if (sample) await go('samples', () => sample(folder))
    await go('checkpoint', () => checkpoint(folder, optimizer, save))
    return branches
  } finally {
    optimizer.zeroGrad()
    // Where nothing could be written there may be nothing to remove, and the first error says more.
    await rm(folder, { recursive: true, force: true }).catch(() => undefined)
  }
}

function nameOf(o: Objective, { parts, counter }: Batch): string {
  const names = parts.map((part) => {
    const { shape, indices, still } = part
    const units = unitsOf(o, part, counter)
    return `[${shape}] × ${indices.length}${still ? ', first frames' : units ? `, units [${units}]` : ', whole'}`
  })
  return names.join(' and ')
}

async function step(
  { data, optimizer, seed = 0 }: Parts,
  objective: Objective,
  batch: Batch,
): Promise<{ loss: number; gradNorm: number }> {
  const { loss, clip } = await sliced(function* () {
    const queued = yield* lossSteps(objective, data, batch, new Generator(seed).stream('rehearsal'))
    yield* backwardSteps(queued.loss)
    const norm = optimizer.gradNorm()
    optimizer.zeroGrad()
    return { loss: queued.loss, clip: norm }
  })
  try {
    return { loss: await loss.item(), gradNorm: (await clip.floats())[0] as number }
  } finally {
    loss.dispose()
    clip.dispose()
  }
}

// Written and read back as a run does it. What is read is what was written, so that nothing changes.
async function checkpoint(
  folder: string,
  optimizer: AdamW,
  save: (dir: string) => Promise<void>,
): Promise<void> {
  const state = join(folder, 'optimizer.safetensors')
  const model = join(folder, 'diffusion_transformer')
  await writeSafetensors(state, optimizer.stateTensors())
  await save(model)
  await optimizer.restore(state, optimizer.stepCount)
  const saved = openWeights(model)
  for (const name of saved.entries.keys()) saved.readFloats(name)
}
