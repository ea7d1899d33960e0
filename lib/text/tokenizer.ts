import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { Tokenizer } from '@huggingface/tokenizers'
import { PyraflowError } from '../engine/errors.ts'
import { readJsonObject } from '../io/pretrained.ts'
import { clipDefinition } from './clip-definition.ts'

/** A prompt as a row of tokens. */
export interface TokenRow {
  /** Padded to the length asked for. */
  readonly ids: number[]
  /** 1 for a token, 0 for padding. */
  readonly mask: number[]
  /** The end of the prompt that did not fit; '' when all did. */
  readonly cut: string
}

/** `t5` ends rows with `</s>`; `clip` puts them between `<|startoftext|>` and `<|endoftext|>`. */
export type TokenizerKind = 't5' | 'clip'

// What the special tokens are called where tokenizer_config.json says nothing.
const SPECIAL = {
  t5: { eos: '</s>', pad: '<pad>' },
  clip: { bos: '<|startoftext|>', eos: '<|endoftext|>', pad: '<|endoftext|>' },
} as const

type JsonObject = Record<string, unknown>

/** A tokenizer of a published model, with truncation and padding of its own. */
export class TextTokenizer {
  /** Longest row according to tokenizer_config.json; undefined when it says nothing. */
  readonly maxLength: number | undefined
  readonly #tokenizer: Tokenizer
  readonly #start: readonly number[]
  readonly #end: number
  readonly #pad: number

  /**
   * @param definition - the parsed tokenizer.json
   * @param config - the parsed tokenizer_config.json
   * @param label - names the tokenizer in errors
   * @throws ERR_CHECKPOINT when the definition is none or lacks a special token.
   */
  constructor(kind: TokenizerKind, definition: JsonObject, config: JsonObject, label = 'tokenizer') {
    try {
      this.#tokenizer = new Tokenizer(definition, config)
    } catch (cause) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: label,
        expected: 'the definition of a tokenizer',
        received: cause instanceof Error ? cause.message : String(cause),
        remedy: 'Download tokenizer.json again.',
        cause,
      })
    }
    const names = SPECIAL[kind]
    const idOf = (field: string, standard: string): number => {
      const token = contentOf(config[field]) ?? standard
      const id = this.#tokenizer.token_to_id(token)
      if (id !== undefined) return id
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `${label}: ${field}`,
        expected: `'${token}' in the vocabulary`,
        received: 'no such token',
        remedy: 'Check that the files of this tokenizer belong together.',
      })
    }
    this.#start = 'bos' in names ? [idOf('bos_token', names.bos)] : []
    this.#end = idOf('eos_token', names.eos)
    this.#pad = idOf('pad_token', names.pad)
    this.maxLength = lengthOf(config)
  }

  /**
   * Loads a published folder: tokenizer.json, or for CLIP vocab.json with merges.txt; tokenizer_config.json and
   * special_tokens_map.json are read when they are there.
   *
   * @throws ERR_IO naming a missing file; ERR_CHECKPOINT naming one that holds no tokenizer.
   */
  static fromPretrained(folder: string, kind: TokenizerKind): TextTokenizer {
    const remedy =
      kind === 't5'
        ? 'Download the whole tokenizer folder; a spiece.model alone is not read.'
        : 'Download the whole tokenizer folder: tokenizer.json, or vocab.json and merges.txt.'
    const read = (name: string): JsonObject =>
      readJsonObject(join(folder, name), { expected: 'a file of the tokenizer', remedy })
    const optional = (name: string): JsonObject => (existsSync(join(folder, name)) ? read(name) : {})
    const config = { ...optional('special_tokens_map.json'), ...optional('tokenizer_config.json') }
    const whole = kind === 't5' || existsSync(join(folder, 'tokenizer.json'))
    const definition = whole ? read('tokenizer.json') : clipDefinition(folder, config, remedy)
    return new TextTokenizer(kind, definition, config, `tokenizer ${folder}`)
  }

  /**
   * A prompt as a row of exactly `length` tokens: cut at the end, marks kept, and padded on the right.
   *
   * @throws ERR_OPTION for a prompt that is no string or a length that has no room for the marks.
   */
  encode(prompt: string, length: number): TokenRow {
    const room = length - this.#start.length - 1
    if (typeof prompt !== 'string' || !Number.isInteger(length) || room < 0) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'tokenizer',
        expected: `a string and a length from ${this.#start.length + 1}`,
        received: `${typeof prompt} and ${length}`,
      })
    }
    const all = prompt === '' ? [] : this.#tokenizer.encode(prompt, { add_special_tokens: false }).ids
    const ids = [...this.#start, ...all.slice(0, room), this.#end]
    const tokens = ids.length
    while (ids.length < length) ids.push(this.#pad)
    const cut = all.length > room ? this.#tokenizer.decode(all.slice(room)).trim() : ''
    return { ids, mask: ids.map((_, i) => (i < tokens ? 1 : 0)), cut }
  }
}

/** Longest row by a tokenizer_config.json. Some hold a number of thirty digits for "no limit", which is none here. */
export function lengthOf({ model_max_length: length }: JsonObject): number | undefined {
  return Number.isSafeInteger(length) && (length as number) > 0 ? (length as number) : undefined
}

/** The text of a special token, which these files give as a string or as an object. */
export function contentOf(token: unknown): string | undefined {
  if (typeof token === 'string') return token
  const content = (token as { content?: unknown } | null | undefined)?.content
  return typeof content === 'string' ? content : undefined
}
