import { join } from 'node:path'
import { engine } from './engine/engine.ts'
import { PyraflowError } from './engine/errors.ts'
import { Rehearsal } from './engine/rehearsal.ts'
import type { GenerateOptions } from './generate/options.ts'
import { readConfig } from './io/pretrained.ts'
import type { PipelineOptions } from './load-pipeline.ts'
import { type ModelFolder, surveyFolder, VAE_FOLDER } from './model-folder.ts'
import { type CausalVaeConfig, CausalVideoVAE } from './models/causal-vae.ts'
import { velocityNetworkSteps } from './models/load-network.ts'
import { Pipeline } from './pipeline.ts'
import { type Plan, pipelineWeights } from './plan.ts'
import type { Rates } from './plan-seconds.ts'
import { Generator } from './tensor/generator.ts'
import { sliced } from './tensor/sliced.ts'
import type { Steps } from './tensor/tape.ts'
import type { TextEncoder } from './text/encoder.ts'
import { LazyPromptEncoder } from './text/lazy-encoder.ts'
import { WordEncoder } from './text/word-encoder.ts'

/**
 * {@link Pipeline.plan} of a model folder that is not loaded: only its config.json files are read, so its weights may
 * still be missing.
 *
 * @throws ERR_CHECKPOINT as `Pipeline.load`; ERR_OPTION; ERR_MEMORY
 */
export async function planFolder(
  dir: string,
  options: GenerateOptions & Pick<PipelineOptions, 'dtype' | 'quantize' | 'variant'> & { rates?: Rates } = {},
): Promise<Plan> {
  const { dtype, quantize, variant, maxMemory, ...rest } = options
  const folder = surveyFolder(dir, { variant })
  return await (await imagined(folder, { dtype, quantize, maxMemory })).plan(rest)
}

/** A pipeline whose weights do not exist; good for plans and nothing else. */
async function imagined(
  folder: ModelFolder,
  {
    dtype = 'f32',
    quantize,
    keep = false,
    maxMemory,
  }: Pick<PipelineOptions, 'dtype' | 'quantize' | 'maxMemory'> & { keep?: boolean },
): Promise<Pipeline> {
  const { dir, variant, config } = folder
  const offload = maxMemory === undefined ? undefined : 'possible'
  const { within } = new Rehearsal(engine)
  const made = <T>(steps: () => Steps<T>): Promise<T> => sliced(steps, { grad: false, within })
  const network = readConfig(join(dir, variant))
  const vae = readConfig(join(dir, VAE_FOLDER)) as Partial<CausalVaeConfig>
  return new Pipeline({
    transformer: await made(() => velocityNetworkSteps(network, { seed: 0, dtype, quantize, offload })),
    vae: await made(() => CausalVideoVAE.createSteps(vae, { generator: new Generator(0), dtype })),
    text: textOf(folder, dtype, keep),
    ...{ config, dtype, quantize, maxMemory },
  })
}

function textOf({ dir, published }: ModelFolder, dtype: 'f32' | 'bf16', keep: boolean): TextEncoder {
  if (!published) return WordEncoder.fromPretrained(join(dir, 'text_encoder'))
  return new LazyPromptEncoder(dir, { dtype, keep, cache: false })
}

/** What a limit on memory leaves of a model between generations. */
export interface Residence {
  /** Whether text encoders stay. */
  readonly keep: boolean
  /** Whether the transformer's matrices can leave, and whether they begin away. */
  readonly offload: 'possible' | 'absent' | undefined
}

/**
 * What may stay in memory within `maxMemory`: the transformer if it fits beside the VAE, text encoders if a video of the
 * model's usual length fits beside them. Without a limit the transformer stays and text encoders do not.
 *
 * @throws ERR_MEMORY when not even the weights that must stay fit
 */
export async function residence(
  folder: ModelFolder,
  { dtype, quantize, maxMemory }: PipelineOptions,
): Promise<Residence> {
  if (maxMemory === undefined) return { keep: false, offload: undefined }
  const pipeline = await imagined(folder, { dtype, quantize, maxMemory })
  const bytes = (offload: boolean): number => {
    const { transformer, vae } = pipelineWeights(pipeline, offload)
    return transformer + vae
  }
  if (bytes(true) > maxMemory) {
    throw new PyraflowError('ERR_MEMORY', {
      what: `weights of ${folder.dir}`,
      expected: `to fit in maxMemory, ${maxMemory} bytes`,
      received: `${bytes(true)} bytes in ${dtype ?? 'f32'} that must stay`,
      remedy: dtype === 'bf16' ? 'Allow more memory.' : 'Allow more memory, or use bf16.',
    })
  }
  if (bytes(false) > maxMemory) return { keep: false, offload: 'absent' }
  return {
    keep: folder.published && (await fitsKept(folder, { dtype, quantize, maxMemory })),
    offload: 'possible',
  }
}

async function fitsKept(
  folder: ModelFolder,
  options: Pick<PipelineOptions, 'dtype' | 'quantize'> & { maxMemory: number },
): Promise<boolean> {
  const { maxMemory } = options
  try {
    const kept = await (await imagined(folder, { ...options, keep: true })).plan()
    return kept.offloaded === 0 && kept.bytes.peak <= maxMemory
  } catch (error) {
    if (error instanceof PyraflowError && error.code === 'ERR_MEMORY') return false
    throw error
  }
}
