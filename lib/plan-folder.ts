import { join } from 'node:path'
import { engine } from './engine/engine.ts'
import { PyraflowError } from './engine/errors.ts'
import { rehearse } from './engine/rehearsal.ts'
import type { GenerateOptions } from './generate/options.ts'
import { readConfig } from './io/pretrained.ts'
import type { PipelineOptions } from './load-pipeline.ts'
import { type ModelFolder, surveyFolder, VAE_FOLDER } from './model-folder.ts'
import { type CausalVaeConfig, CausalVideoVAE } from './models/causal-vae.ts'
import { createVelocityNetwork } from './models/load-network.ts'
import { Pipeline } from './pipeline.ts'
import { type Plan, pipelineWeights } from './plan.ts'
import type { Rates } from './plan-seconds.ts'
import { Generator } from './tensor/generator.ts'
import type { TextEncoder } from './text/encoder.ts'
import { LazyPromptEncoder } from './text/lazy-encoder.ts'
import { WordEncoder } from './text/word-encoder.ts'

/**
 * {@link Pipeline.plan} of a model folder that is not loaded: only its config.json files are read, so its weights may
 * still be missing.
 *
 * @throws ERR_CHECKPOINT as `Pipeline.load`; ERR_OPTION; ERR_MEMORY
 */
export function planFolder(
  dir: string,
  options: GenerateOptions & Pick<PipelineOptions, 'dtype' | 'variant'> & { rates?: Rates } = {},
): Plan {
  const { dtype, variant, maxMemory, ...rest } = options
  const folder = surveyFolder(dir, { variant })
  return imagined(folder, { dtype, maxMemory }).plan(rest)
}

/** A pipeline whose weights do not exist; good for plans and nothing else. */
function imagined(
  folder: ModelFolder,
  {
    dtype = 'f32',
    keep = false,
    maxMemory,
  }: Pick<PipelineOptions, 'dtype' | 'maxMemory'> & { keep?: boolean },
): Pipeline {
  const { dir, variant, config } = folder
  return rehearse(engine, () => {
    const vae = readConfig(join(dir, VAE_FOLDER)) as Partial<CausalVaeConfig>
    return new Pipeline({
      transformer: createVelocityNetwork(readConfig(join(dir, variant)), { seed: 0, dtype }),
      vae: CausalVideoVAE.create(vae, { generator: new Generator(0), dtype }),
      text: textOf(folder, dtype, keep),
      ...{ config, dtype, maxMemory },
    })
  })
}

function textOf({ dir, published }: ModelFolder, dtype: 'f32' | 'bf16', keep: boolean): TextEncoder {
  if (!published) return WordEncoder.fromPretrained(join(dir, 'text_encoder'))
  return new LazyPromptEncoder(dir, { dtype, keep, cache: false })
}

/**
 * Whether text encoders may stay in memory within `maxMemory`; without a limit they do not.
 *
 * @throws ERR_MEMORY when not even the other weights fit
 */
export function fitsKept(folder: ModelFolder, { dtype, maxMemory }: PipelineOptions): boolean {
  if (maxMemory === undefined) return false
  const { transformer, vae } = pipelineWeights(imagined(folder, { dtype, maxMemory }))
  if (transformer + vae > maxMemory) {
    throw new PyraflowError('ERR_MEMORY', {
      what: `weights of ${folder.dir}`,
      expected: `to fit in maxMemory, ${maxMemory} bytes`,
      received: `${transformer + vae} bytes in ${dtype ?? 'f32'}`,
      remedy: dtype === 'bf16' ? 'Allow more memory.' : 'Allow more memory, or use bf16.',
    })
  }
  if (!folder.published) return false
  try {
    return imagined(folder, { dtype, maxMemory, keep: true }).plan().bytes.peak <= maxMemory
  } catch (error) {
    if (error instanceof PyraflowError && error.code === 'ERR_MEMORY') return false
    throw error
  }
}
