import { readFileSync } from 'node:fs'
import { mkdir } from 'node:fs/promises'
import { basename, join } from 'node:path'
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
  return readJsonObject(join(folder, 'config.json'), {
    expected: 'the config.json of a model folder',
    remedy: 'Give the folder that holds config.json and the weights, for example causal_video_vae.',
  })
}

/**
 * Reads a JSON file that holds an object.
 *
 * @param missing - what to tell when it cannot be read
 * @throws PyraflowError `ERR_IO` when it is missing or unreadable, `ERR_CHECKPOINT` when it is not a
 * JSON object.
 */
export function readJsonObject(
  path: string,
  missing: { readonly expected: string; readonly remedy: string },
): Record<string, unknown> {
  const text = readText(path, missing)
  let parsed: unknown
  let reason: unknown
  try {
    parsed = JSON.parse(text)
  } catch (cause) {
    reason = cause
  }
  if (typeof parsed === 'object' && parsed !== null && !Array.isArray(parsed)) {
    return parsed as Record<string, unknown>
  }
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: path,
    expected: 'a JSON object',
    received: reason instanceof Error ? reason.message : text.slice(0, 40),
    remedy: `Download ${basename(path)} again.`,
    cause: reason,
  })
}

/** Reads a text file of a model folder. @throws PyraflowError `ERR_IO` saying what was expected there. */
export function readText(
  path: string,
  missing: { readonly expected: string; readonly remedy: string },
): string {
  try {
    return readFileSync(path, 'utf8')
  } catch (cause) {
    const absent = (cause as NodeJS.ErrnoException).code === 'ENOENT'
    throw new PyraflowError('ERR_IO', {
      what: path,
      ...missing,
      received: absent ? 'no such file' : cause instanceof Error ? cause.message : String(cause),
      cause,
    })
  }
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
