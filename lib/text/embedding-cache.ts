import { createHash } from 'node:crypto'
import { mkdir, readdir } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { engine } from '../engine/engine.ts'
import { addFile } from '../io/fingerprint.ts'
import { openSafetensors } from '../io/safetensors.ts'
import { type TensorToWrite, writeSafetensors } from '../io/write-safetensors.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { TextFeatures } from './encoder.ts'
import { textLayoutOf, textLayouts } from './prompt-networks.ts'

/** Features of one prompt, and what was said while they were made. */
export interface CachedFeatures {
  readonly features: TextFeatures
  readonly warnings: readonly string[]
}

/** Features of one prompt as they are written: `embeds`, `mask` and `pooled`, each [1, …]. */
export async function featureTensors({ embeds, mask, pooled }: TextFeatures): Promise<TensorToWrite[]> {
  const raw = async (name: string, tensor: Tensor): Promise<TensorToWrite> => {
    const bf16 = tensor.dtype === 'bf16'
    const data = bf16 ? new Uint16Array(tensor.size) : new Float32Array(tensor.size)
    await engine.read(tensor.storage, tensor.byteOffset, data)
    return { name, dtype: bf16 ? 'BF16' : 'F32', shape: tensor.shape, data }
  }
  const tokens = Int32Array.from(mask[0] as number[])
  return [
    await raw('embeds', embeds),
    { name: 'mask', dtype: 'I32', shape: [1, tokens.length], data: tokens },
    await raw('pooled', pooled),
  ]
}

// Raised when the same key would stand for other features.
const FORMAT = 'pyraflow-prompt-1'
/** Where prompt features are kept unless a caller says otherwise: `$XDG_CACHE_HOME/pyraflow/prompts` or below `~/.cache`. */
export function defaultCacheFolder(): string {
  const base = process.env.XDG_CACHE_HOME
  return join(base?.startsWith('/') ? base : join(homedir(), '.cache'), 'pyraflow', 'prompts')
}

/**
 * A hash of the files that the text features of a model folder depend on, as {@link addFile} sees them. Copies of a
 * folder agree; times and names of folders do not count.
 *
 * @throws ERR_IO as reading the files does
 */
export async function encoderIdentity(dir: string): Promise<string> {
  const hash = createHash('sha256')
  const parts = textLayouts[textLayoutOf(dir)]
  for (const suffix of [...parts.clip, parts.t5]) {
    for (const part of ['text_encoder', 'tokenizer']) {
      const folder = join(dir, `${part}${suffix}`)
      for (const name of (await readdir(folder)).sort()) {
        if (/\.(json|txt|safetensors)$/.test(name))
          await addFile(hash, `${part}${suffix}/${name}`, join(folder, name))
      }
    }
  }
  return hash.digest('hex')
}

/** Features of prompts on disk, a file each; a file that cannot be read is as good as none, and is written again. */
export class EmbeddingCache {
  readonly folder: string
  readonly #encoder: string

  /** @param encoder - what features depend on besides the prompt */
  constructor(folder: string, encoder: string) {
    this.folder = folder
    this.#encoder = encoder
  }

  path(prompt: string): string {
    const key = createHash('sha256')
      .update(JSON.stringify([FORMAT, this.#encoder, prompt]))
      .digest('hex')
    return join(this.folder, `${key}.safetensors`)
  }

  /** Undefined when there are none; the caller disposes them. */
  read(prompt: string): CachedFeatures | undefined {
    try {
      const file = openSafetensors(this.path(prompt))
      const { encoder, format, warnings = '[]' } = file.metadata
      if (encoder !== this.#encoder || format !== FORMAT) return undefined
      const arrays = (['embeds', 'mask', 'pooled'] as const).map((name) => file.readArray(name))
      const said = JSON.parse(warnings) as string[]
      const [embeds, pooled] = ['embeds', 'pooled'].map((name, i) => {
        const { dtype, shape } = file.entries.get(name) as { dtype: string; shape: readonly number[] }
        const tensor = Tensor.empty(shape, dtype === 'BF16' ? 'bf16' : 'f32')
        engine.write(tensor.storage, 0, arrays[2 * i] as Float32Array | Uint16Array)
        return tensor
      }) as [Tensor, Tensor]
      return { features: { embeds, mask: [Array.from(arrays[1] as Int32Array)], pooled }, warnings: said }
    } catch {
      return undefined
    }
  }

  /** @throws ERR_IO when the folder cannot be written to */
  async write(prompt: string, { features, warnings }: CachedFeatures): Promise<void> {
    await mkdir(this.folder, { recursive: true })
    const tensors = await featureTensors(features)
    const metadata = { format: FORMAT, encoder: this.#encoder, warnings: JSON.stringify(warnings) }
    await writeSafetensors(this.path(prompt), tensors, metadata)
  }
}
