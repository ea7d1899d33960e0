import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { writeFileAtomically } from '../io/atomic.ts'
import { readConfig } from '../io/pretrained.ts'
import { uniformAt } from '../tensor/shuffle.ts'
import { Tensor } from '../tensor/tensor.ts'
import { type EncodeOptions, emitWarning, type ImmediateTextEncoder, type TextFeatures } from './encoder.ts'

export interface WordEncoderConfig {
  vocabulary: string[]
  /** Width of a word's vector. */
  dim: number
  /** Most words of a prompt, end mark included. */
  maxLength: number
  seed: number
}

const END = '</s>'

/**
 * A frozen encoder for closed vocabularies: every word has a fixed random unit-variance vector, its place a sinusoid.
 * It stands behind the same interface as the T5/CLIP pair, so that small models train and sample through the same code.
 */
export class WordEncoder implements ImmediateTextEncoder {
  readonly config: WordEncoderConfig
  readonly #index: Map<string, number>
  readonly #vectors = new Map<number, Float64Array>()
  readonly #places: Float64Array[] = []

  constructor(config: WordEncoderConfig) {
    this.config = config
    this.#index = new Map([END, ...config.vocabulary].map((word, i) => [word, i]))
  }

  get jointDim(): number {
    return this.config.dim
  }

  get pooledDim(): number {
    return this.config.dim
  }

  get maxLength(): number {
    return this.config.maxLength
  }

  /** @throws ERR_IO, ERR_CHECKPOINT for a config.json that lacks a field. */
  static fromPretrained(dir: string): WordEncoder {
    const config = readConfig(dir) as unknown as WordEncoderConfig
    const { vocabulary, dim, maxLength, seed } = config
    const whole = [dim, maxLength, seed].every((n) => Number.isSafeInteger(n) && n >= 0)
    if (!whole || !Array.isArray(vocabulary) || !vocabulary.every((word) => typeof word === 'string')) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `text encoder ${dir}: config.json`,
        expected: 'vocabulary (a list of words), dim, maxLength and seed (whole numbers)',
        received: JSON.stringify({ vocabulary: typeof vocabulary, dim, maxLength, seed }),
      })
    }
    return new WordEncoder(config)
  }

  async save(dir: string): Promise<void> {
    mkdirSync(dir, { recursive: true })
    const config = { _class_name: 'WordEncoder', ...this.config }
    await writeFileAtomically(join(dir, 'config.json'), `${JSON.stringify(config, null, 1)}\n`)
  }

  /** @throws ERR_OPTION naming a word outside the vocabulary and the nearest one in it. */
  tokenize(prompt: string, onWarning: (message: string) => void = emitWarning): number[] {
    const words = prompt.toLowerCase().match(/[a-z0-9]+/g) ?? []
    const ids = words.map((word) => {
      const id = this.#index.get(word)
      if (id === undefined) {
        throw new PyraflowError('ERR_OPTION', {
          what: `prompt word "${word}"`,
          expected: `words of this model's vocabulary (${this.config.vocabulary.join(' ')})`,
        })
      }
      return id
    })
    const room = this.config.maxLength - 1
    if (ids.length > room) {
      onWarning(
        `The prompt is longer than ${room} words; the model does not see "${words.slice(room).join(' ')}"`,
      )
    }
    return [...ids.slice(0, room), 0]
  }

  #word(id: number): Float64Array {
    const known = this.#vectors.get(id)
    if (known) return known
    // Sums of twelve uniforms are normal enough here and the same on every platform.
    const vector = Float64Array.from({ length: this.config.dim }, (_, j) => {
      let v = -6
      for (let i = 0; i < 12; i++) v += uniformAt(this.config.seed, (id * this.config.dim + j) * 12 + i)
      return v
    })
    this.#vectors.set(id, vector)
    return vector
  }

  /** Half the sinusoid of the word's place in the prompt. */
  #place(s: number): Float64Array {
    const { dim } = this.config
    this.#places[s] ??= Float64Array.from({ length: dim }, (_, j) => {
      const angle = s / 30 ** (Math.floor(j / 2) / (dim / 2))
      return 0.5 * (j % 2 ? Math.cos(angle) : Math.sin(angle))
    })
    return this.#places[s] as Float64Array
  }

  encode(prompts: readonly string[], { onWarning }: EncodeOptions = {}): TextFeatures {
    const { dim, maxLength } = this.config
    const embeds = new Float32Array(prompts.length * maxLength * dim)
    const pooled = new Float32Array(prompts.length * dim)
    const mask = prompts.map((prompt, r) => {
      const ids = this.tokenize(prompt, onWarning)
      ids.forEach((id, s) => {
        const vector = this.#word(id)
        const place = this.#place(s)
        for (let j = 0; j < dim; j++) {
          embeds[(r * maxLength + s) * dim + j] = (vector[j] as number) + (place[j] as number)
          pooled[r * dim + j] = (pooled[r * dim + j] as number) + (vector[j] as number) / 3
        }
      })
      return Array.from({ length: maxLength }, (_, s) => (s < ids.length ? 1 : 0))
    })
    return {
      embeds: Tensor.from(embeds, [prompts.length, maxLength, dim]),
      mask,
      pooled: Tensor.from(pooled, [prompts.length, dim]),
    }
  }
}
