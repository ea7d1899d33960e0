import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { readConfig } from '../io/pretrained.ts'
import type { ComputeType } from '../nn/weights.ts'
import { scope } from '../tensor/scope.ts'
import { encoderIdentity, featureTensors } from '../text/embedding-cache.ts'
import {
  disposeFeatures,
  emitWarning,
  type ImmediateTextEncoder,
  type TextEncoder,
  type TextFeatures,
} from '../text/encoder.ts'
import { LazyPromptEncoder } from '../text/lazy-encoder.ts'
import { architectureOf } from '../text/network.ts'
import { WordEncoder } from '../text/word-encoder.ts'
import { type CacheHeader, readIndex, SHARDS, shardsOf, writeIndex } from './cache-index.ts'
import { MappedShards, type RowPlace } from './mapped-shards.ts'
import { Filling, ShardFolder } from './shards.ts'

const TEXTS = 'pyraflow-texts-1'
const REMEDY = '`pyraflow encode --text-encoder`'
// Prompts that pass through the networks together: what an interrupted call loses, and what one pass over T5 serves.
const TOGETHER = 32

export interface EncodeTextsOptions {
  /** Type of the networks and of the features; default `f32`. */
  dtype?: ComputeType | undefined
  /** Keep the networks in memory from the first prompts to the last; default: each pass over them reads them again. */
  keep?: boolean | undefined
  signal?: AbortSignal | undefined
  /** Texts done, of all different ones; the empty one is among them. */
  onProgress?: ((done: number, total: number) => void) | undefined
  /** Is told what of a text was cut; default: a process warning. */
  onWarning?: ((message: string) => void) | undefined
}

/** What {@link encodeTexts} did. */
export interface EncodedTexts {
  /** Different texts in the cache, the empty one included. */
  readonly texts: number
  readonly encoded: number
  readonly reused: number
  readonly bytes: number
}

interface TextLine {
  readonly key: string
  readonly text: string
}

/** An encoder and a name for what its features depend on. */
async function openEncoder(
  dir: string,
  { dtype = 'f32', keep = false }: EncodeTextsOptions,
): Promise<{ encoder: TextEncoder; identity: string }> {
  const folder = join(dir, 'text_encoder')
  if (architectureOf(readConfig(folder)) === 'WordEncoder') {
    const encoder = WordEncoder.fromPretrained(folder)
    const { vocabulary, dim, maxLength, seed } = encoder.config
    const text = JSON.stringify([vocabulary, dim, maxLength, seed])
    return { encoder, identity: `words:${createHash('sha256').update(text).digest('hex')}` }
  }
  // Shards hold what its own cache would hold a second time.
  const encoder = new LazyPromptEncoder(dir, { dtype, keep, cache: false })
  return { encoder, identity: `${dtype}:${await encoderIdentity(dir)}` }
}

/**
 * Encodes the captions of a data set, and the empty text that stands for a dropped one, into the folder `out`, each
 * different text once, as they are (no suffix). What is there is used where the text encoder is the same; an interrupted
 * call goes on where it was.
 *
 * @param dir - model folder with the text encoders and tokenizers of any kind
 * @throws ERR_IO, ERR_CHECKPOINT as loading does; ERR_OPTION for words that a word encoder does not know; ERR_ABORTED
 */
export async function encodeTexts(
  dir: string,
  captions: readonly string[],
  out: string,
  options: EncodeTextsOptions = {},
): Promise<EncodedTexts> {
  const { signal, onProgress, onWarning = emitWarning } = options
  const { encoder, identity } = await openEncoder(dir, options)
  try {
    const store = await ShardFolder.open(join(out, SHARDS), TEXTS)
    const texts = [...new Set(['', ...captions])]
    const keyOf = (text: string): string =>
      createHash('sha256')
        .update(JSON.stringify([TEXTS, identity, text]))
        .digest('hex')
        .slice(0, 32)
    const filling = new Filling(store, await shardsOf(out, TEXTS))
    let encoded = 0
    for (let at = 0; at < texts.length; at += TOGETHER) {
      throwIfAborted(signal, 'encoding texts')
      const some = texts.slice(at, at + TOGETHER)
      const missing = some.filter((text) => !store.has(keyOf(text)))
      if (missing.length > 0) {
        const features = await encodeEach(encoder, missing, { signal, onWarning })
        try {
          for (const [i, text] of missing.entries()) {
            const tensors = await featureTensors(features[i] as TextFeatures)
            const rows = { keys: [keyOf(text)], tensors, facts: [{}], settings: { encoder: identity } }
            await store.write(rows, signal)
          }
        } finally {
          features.forEach(disposeFeatures)
        }
        encoded += missing.length
      }
      for (const text of some) await filling.add(keyOf(text), signal)
      onProgress?.(Math.min(at + TOGETHER, texts.length), texts.length)
    }
    await filling.close(signal)
    const lines = texts.map((text): TextLine => ({ key: keyOf(text), text }))
    const shards = filling.files.map((file) => ({ file }))
    await writeIndex(out, { format: TEXTS, entries: lines.length, shards }, lines, signal)
    await store.sweep(new Set(filling.files))
    const bytes = lines.reduce((n, { key }) => n + store.rowBytes(key), 0)
    return { texts: texts.length, encoded, reused: texts.length - encoded, bytes }
  } finally {
    encoder.dispose?.()
  }
}

async function encodeEach(
  encoder: TextEncoder,
  texts: readonly string[],
  options: { signal: AbortSignal | undefined; onWarning: (message: string) => void },
): Promise<TextFeatures[]> {
  if (encoder.encodeEach) return await encoder.encodeEach(texts, options)
  const all: TextFeatures[] = []
  try {
    for (const text of texts) all.push(await encoder.encode([text], options))
    return all
  } catch (error) {
    all.forEach(disposeFeatures)
    throw error
  }
}

/**
 * A text encoder of what {@link encodeTexts} wrote: it gives the features that the networks gave, without them. Features
 * are gathered in native memory.
 */
export class CachedTextEncoder implements ImmediateTextEncoder {
  readonly jointDim: number
  readonly pooledDim: number
  readonly maxLength: number
  readonly #dir: string
  readonly #shards: MappedShards
  readonly #places: ReadonlyMap<string, RowPlace>
  readonly #masks: readonly Int32Array[]

  private constructor(dir: string, index: CacheHeader, lines: readonly TextLine[], shards: MappedShards) {
    this.#dir = dir
    this.#shards = shards
    const [embeds, pooled] = ['embeds', 'pooled'].map((name) => shards.entry(0, name).shape) as [
      readonly number[],
      readonly number[],
    ]
    this.maxLength = embeds[1] as number
    this.jointDim = embeds[2] as number
    this.pooledDim = pooled[1] as number
    this.#masks = index.shards.map((_, shard) => shards.readArray(shard, 'mask') as Int32Array)
    const places = new Map<string, RowPlace>()
    for (const { key, text } of lines) {
      const place = shards.place(key)
      if (!place) throw this.#missing(text, 'ERR_CHECKPOINT')
      places.set(text, place)
    }
    this.#places = places
  }

  /** @throws ERR_IO when there is no text cache in the folder; ERR_CHECKPOINT when it is damaged or of another kind */
  static async open(dir: string): Promise<CachedTextEncoder> {
    const { header, lines } = await readIndex<CacheHeader, TextLine>(dir, TEXTS, REMEDY)
    const paths = header.shards.map(({ file }) => join(dir, SHARDS, file))
    const shards = MappedShards.open(paths, TEXTS, ['embeds', 'pooled'])
    try {
      return new CachedTextEncoder(dir, header, lines, shards)
    } catch (error) {
      shards.dispose()
      throw error
    }
  }

  /** Features of R texts that are in the cache. @throws ERR_OPTION naming one that is not, or for none */
  encode(prompts: readonly string[]): TextFeatures {
    if (prompts.length === 0) {
      throw new PyraflowError('ERR_OPTION', { what: 'prompts', expected: 'one or more', received: 'none' })
    }
    const places = prompts.map((prompt) => {
      const place = this.#places.get(prompt)
      if (place) return place
      throw this.#missing(prompt, 'ERR_OPTION')
    })
    const length = this.maxLength
    return scope(() => ({
      embeds: this.#shards.gather('embeds', places).view([places.length, length, this.jointDim]),
      mask: places.map(({ shard, row }) =>
        Array.from((this.#masks[shard] as Int32Array).subarray(row * length, (row + 1) * length)),
      ),
      pooled: this.#shards.gather('pooled', places),
    }))
  }

  #missing(text: string, code: 'ERR_OPTION' | 'ERR_CHECKPOINT'): PyraflowError {
    return new PyraflowError(code, {
      what: `text cache ${this.#dir}`,
      expected: 'a text that was encoded',
      received: JSON.stringify(text),
      remedy: `Encode the captions again with ${REMEDY}: only what is missing is made.`,
    })
  }

  /** Frees the features; the encoder cannot be used afterwards. */
  dispose(): void {
    this.#shards.dispose()
  }
}
