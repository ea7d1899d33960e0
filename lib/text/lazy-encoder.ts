import { DTYPES } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { defaultNegativePrompt, promptSuffix } from '../models/presets.ts'
import { concat } from '../ops/copy.ts'
import { sum } from '../ops/reduce.ts'
import { keep, scope } from '../tensor/scope.ts'
import { type CachedFeatures, EmbeddingCache, encoderIdentity } from './embedding-cache.ts'
import {
  disposeFeatures,
  type EncodeOptions,
  emitWarning,
  type TextEncoder,
  type TextFeatures,
} from './encoder.ts'
import { PromptEncoder, type PromptEncoderOptions } from './prompt-encoder.ts'
import { promptMemory, type TextMemory } from './prompt-memory.ts'
import { promptWidths } from './prompt-networks.ts'
import { promptLength } from './prompt-tokenizers.ts'

/** How a text encoder comes and goes. */
export interface LazyEncoderOptions extends Pick<PromptEncoderOptions, 'dtype' | 'onWarning'> {
  /** Keep the networks in memory once they are loaded. Default false. */
  readonly keep?: boolean
  /** Folder of features that were computed before; false: none. */
  readonly cache: string | false
}

/**
 * The text encoder of a published model that is in memory only while a prompt is encoded: features that are on disk
 * need no network at all, and T5 passes through memory layer by layer.
 */
export class LazyPromptEncoder implements TextEncoder {
  readonly promptSuffix: string = promptSuffix
  readonly negativePrompt: string = defaultNegativePrompt
  readonly maxLength: number
  readonly jointDim: number
  readonly pooledDim: number
  readonly #dir: string
  readonly #options: LazyEncoderOptions
  #kept: PromptEncoder | undefined
  #disposed = false
  #cache: Promise<EmbeddingCache | undefined> | undefined

  /** Reads the config.json files. @throws ERR_IO, ERR_CHECKPOINT */
  constructor(dir: string, options: LazyEncoderOptions) {
    this.#dir = dir
    this.#options = options
    const { joint, pooled } = promptWidths(dir)
    this.jointDim = joint
    this.pooledDim = pooled
    this.maxLength = promptLength(dir)
  }

  /** Features of R prompts; see {@link encodeEach}. */
  async encode(prompts: readonly string[], options: EncodeOptions = {}): Promise<TextFeatures> {
    const each = await this.encodeEach(prompts, options)
    if (each.length === 1) return each[0] as TextFeatures
    const [embeds, pooled] = scope(() => [
      concat(
        each.map((f) => f.embeds),
        0,
      ),
      concat(
        each.map((f) => f.pooled),
        0,
      ),
    ]) as [TextFeatures['embeds'], TextFeatures['pooled']]
    each.forEach(disposeFeatures)
    return { embeds, mask: each.flatMap(({ mask }) => mask), pooled }
  }

  /**
   * Features of each prompt, of one row, as if it had been encoded alone; the networks are loaded once for all that are
   * not on disk. The caller disposes them.
   *
   * @throws ERR_OPTION for no prompts; ERR_IO, ERR_CHECKPOINT as loading does; ERR_NUMERICS when the networks give NaN;
   * ERR_ABORTED
   */
  async encodeEach(prompts: readonly string[], options: EncodeOptions = {}): Promise<TextFeatures[]> {
    if (prompts.length === 0) {
      throw new PyraflowError('ERR_OPTION', { what: 'prompts', expected: 'one or more', received: 'none' })
    }
    if (this.#disposed) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'text encoder',
        received: 'a prompt after it was disposed',
      })
    }
    const warn = options.onWarning ?? this.#options.onWarning ?? emitWarning
    this.#cache ??= this.#openCache()
    const cache = await this.#cache
    const found = new Map<string, CachedFeatures>()
    const results: TextFeatures[] = []
    try {
      for (const prompt of new Set(prompts)) {
        const known = cache?.read(prompt)
        if (known) found.set(prompt, owned(known))
      }
      const missing = [...new Set(prompts)].filter((prompt) => !found.has(prompt))
      if (missing.length > 0) {
        const made = await this.#compute(missing, options)
        for (const [i, prompt] of missing.entries()) found.set(prompt, owned(made[i] as CachedFeatures))
        const remember = (prompt: string) => cache?.write(prompt, found.get(prompt) as CachedFeatures)
        // A cache that cannot be written to costs time, not the video.
        await Promise.all(missing.map(remember)).catch((error: Error) => {
          warn(`Features of prompts could not be kept on disk: ${error.message}`)
        })
      }
      for (const { warnings } of found.values()) warnings.forEach(warn)
      for (const prompt of prompts) {
        const { embeds, mask, pooled } = (found.get(prompt) as CachedFeatures).features
        results.push({
          embeds: keep(embeds.view(embeds.shape)),
          mask: mask.map((row) => [...row]),
          pooled: keep(pooled.view(pooled.shape)),
        })
      }
      return results
    } finally {
      for (const { features } of found.values()) disposeFeatures(features)
    }
  }

  async #openCache(): Promise<EmbeddingCache | undefined> {
    const { cache, dtype = 'f32' } = this.#options
    if (cache === false) return undefined
    return new EmbeddingCache(cache, `${dtype}:${await encoderIdentity(this.#dir)}`)
  }

  async #compute(prompts: readonly string[], { signal }: EncodeOptions): Promise<CachedFeatures[]> {
    const encoder = this.#kept ?? (await this.#open(signal))
    try {
      const warnings: string[][] = []
      const tokens = prompts.map((prompt) => {
        const heard: string[] = []
        warnings.push(heard)
        return encoder.tokenize([prompt], (message) => void heard.push(message))
      })
      const features = await encoder.networks.forwardEach(tokens, { signal })
      try {
        for (const f of features) await checkFinite(this.#dir, f)
      } catch (error) {
        features.forEach(disposeFeatures)
        throw error
      }
      return features.map((f, i) => ({ features: f, warnings: warnings[i] as string[] }))
    } finally {
      if (this.#kept !== encoder) encoder.dispose()
    }
  }

  async #open(signal: AbortSignal | undefined): Promise<PromptEncoder> {
    const { dtype = 'f32', keep: resident = false } = this.#options
    const encoder = await PromptEncoder.fromPretrained(this.#dir, { dtype, resident, signal })
    if (resident) this.#kept = encoder
    return encoder
  }

  memory(prompts: number): TextMemory {
    const { dtype = 'f32', keep: kept = false } = this.#options
    return promptMemory(this.#dir, { prompts, bytes: DTYPES[dtype].bytes, keep: kept })
  }

  /** Frees the networks, if they were kept; the encoder cannot be used afterwards. */
  dispose(): void {
    this.#disposed = true
    this.#kept?.dispose()
    this.#kept = undefined
  }
}

function owned(cached: CachedFeatures): CachedFeatures {
  keep(cached.features.embeds)
  keep(cached.features.pooled)
  return cached
}

async function checkFinite(dir: string, { embeds, pooled }: TextFeatures): Promise<void> {
  for (const [what, tensor] of [
    ['T5', embeds],
    ['CLIP', pooled],
  ] as const) {
    const total = sum(tensor)
    const value = await total.item()
    total.dispose()
    if (Number.isFinite(value)) continue
    throw new PyraflowError('ERR_NUMERICS', {
      what: `text encoder ${dir}: ${what}`,
      expected: 'finite features',
      received: String(value),
      remedy: 'Its weights are damaged: download them again. If they are not, use another dtype.',
    })
  }
}
