import { readFileSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { type WriteOptions, writeFileAtomic } from './atomic-stream.ts'
import { type TensorToWrite, writeSafetensors } from './write-safetensors.ts'

export { findWeights, type WeightsLocation } from './find-weights.ts'

/** The parsed `config.json` of a model folder; fields are checked by the model that uses them. */
export type ModelConfig = Record<string, unknown>

/**
 * Reads `config.json` of a diffusers-style model folder.
 *
 * @throws PyraflowError `ERR_IO` when it is missing or unreadable, `ERR_CHECKPOINT` when it is not a
 * JSON object.
 */
export function readConfig(folder: string): ModelConfig {
  const path = join(folder, 'config.json')
  let text: string
  try {
    text = readFileSync(path, 'utf8')
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT'
    throw new PyraflowError('ERR_IO', {
      what: path,
      expected: 'the config.json of a model folder',
      received: missing ? 'no such file' : cause instanceof Error ? cause.message : String(cause),
      remedy: 'Give the folder that holds config.json and the weights, for example causal_video_vae.',
      cause,
    })
  }
  let parsed: unknown
  let reason: unknown
  try {
    parsed = JSON.parse(text)
  } catch (cause) {
    reason = cause
  }
  if (typeof parsed === 'object' && parsed !== null && !Array.isArray(parsed)) return parsed as ModelConfig
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: path,
    expected: 'a JSON object',
    received: reason instanceof Error ? reason.message : text.slice(0, 40),
    remedy: 'Download config.json again.',
    cause: reason,
  })
}

/**
 * Writes a model folder as published ones are laid out: `config.json` and
 * `diffusion_pytorch_model.safetensors` (or `options.weightsName`), each atomically. The folder is made
 * if needed. Weights go first, so a config never stands beside weights that are not there yet.
 *
 * @throws PyraflowError as {@link writeSafetensors} does.
 */
export async function writePretrained(
  folder: string,
  config: ModelConfig,
  tensors: readonly TensorToWrite[],
  options: WriteOptions & { readonly weightsName?: string; readonly metadata?: Record<string, string> } = {},
): Promise<void> {
  try {
    await mkdir(folder, { recursive: true })
  } catch (cause) {
    throw new PyraflowError('ERR_IO', {
      what: `model folder ${folder}`,
      expected: 'a folder that exists or can be made',
      received: cause instanceof Error ? cause.message : String(cause),
      remedy: 'Choose a folder that this user may write to.',
      cause,
    })
  }
  const weights = options.weightsName ?? 'diffusion_pytorch_model.safetensors'
  // Loaders of other libraries look for this marker before they accept a file.
  await writeSafetensors(join(folder, weights), tensors, { format: 'pt', ...options.metadata }, options)
  await writeFileAtomic(join(folder, 'config.json'), `${JSON.stringify(config, null, 2)}\n`, options)
}
