import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { readJsonObject } from '../io/pretrained.ts'
import { type PromptTokens, textLayoutOf, textLayouts } from './prompt-networks.ts'
import { lengthOf, TextTokenizer } from './tokenizer.ts'

/** Tokens of a T5 row of the published models, whose tokenizer itself would take more (spec/text.md). */
const T5_LENGTH = 128

/** Tokens of a T5 row for a tokenizer_config.json that gives this length: smaller models may take fewer than the published. */
function t5Length(maxLength: number | undefined): number {
  return Math.min(maxLength ?? T5_LENGTH, T5_LENGTH)
}

/** Tokens of a T5 row of a model folder; only the tokenizer_config.json is read. @throws ERR_CHECKPOINT when it is no JSON */
export function promptLength(dir: string): number {
  const path = join(dir, `tokenizer${textLayouts[textLayoutOf(dir)].t5}`, 'tokenizer_config.json')
  if (!existsSync(path)) return T5_LENGTH
  const remedy = 'Download the whole tokenizer folder.'
  return t5Length(lengthOf(readJsonObject(path, { expected: 'a file of the tokenizer', remedy })))
}

// Where a CLIP tokenizer says nothing of its length.
const CLIP_LENGTH = 77

/**
 * Whether the folders of a model's tokenizers hold their files; they are not read.
 *
 * @throws ERR_CHECKPOINT naming the first that does not
 */
export function checkTokenizers(dir: string): void {
  const { clip, t5 } = textLayouts[textLayoutOf(dir)]
  const clipFiles = [['tokenizer.json'], ['vocab.json', 'merges.txt']]
  for (const [suffix, sets] of [
    ...clip.map((suffix) => [suffix, clipFiles] as const),
    [t5, [['tokenizer.json']]] as const,
  ]) {
    const folder = join(dir, `tokenizer${suffix}`)
    if (sets.some((files) => files.every((file) => existsSync(join(folder, file))))) continue
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: `tokenizer ${folder}`,
      expected: sets.map((files) => files.join(' and ')).join(', or '),
      received: existsSync(folder) ? readdirSync(folder).join(', ') || 'an empty folder' : 'no such folder',
      remedy: 'Download the whole folder; a spiece.model alone is not read.',
    })
  }
}

/** The tokenizers of a published model. */
export class PromptTokenizers {
  readonly clip: readonly TextTokenizer[]
  readonly t5: TextTokenizer
  /** Tokens of a CLIP row: what the first CLIP tokenizer says counts for all. */
  readonly clipLength: number
  /** Tokens of a T5 row. */
  readonly t5Length: number

  constructor(clip: readonly TextTokenizer[], t5: TextTokenizer) {
    this.clip = clip
    this.t5 = t5
    this.clipLength = clip[0]?.maxLength ?? CLIP_LENGTH
    this.t5Length = t5Length(t5.maxLength)
  }

  /**
   * Loads the folders `tokenizer`, `tokenizer_2` and, for SD3 models, `tokenizer_3` of a model folder.
   *
   * @throws ERR_IO naming a missing file; ERR_CHECKPOINT naming one that holds no tokenizer.
   */
  static fromPretrained(dir: string): PromptTokenizers {
    const parts = textLayouts[textLayoutOf(dir)]
    const clip = parts.clip.map((suffix) =>
      TextTokenizer.fromPretrained(join(dir, `tokenizer${suffix}`), 'clip'),
    )
    return new PromptTokenizers(clip, TextTokenizer.fromPretrained(join(dir, `tokenizer${parts.t5}`), 't5'))
  }

  /** Tokens of R prompts, padded; `warn` is told, once a prompt and network, what was cut. */
  encode(prompts: readonly string[], warn: (message: string) => void): PromptTokens {
    const rows = (tokenizer: TextTokenizer, length: number, name: string) =>
      prompts.map((prompt) => {
        const row = tokenizer.encode(prompt, length)
        if (row.cut !== '')
          warn(`The prompt is longer than ${length} tokens; ${name} does not see "${row.cut}"`)
        return row
      })
    const t5 = rows(this.t5, this.t5Length, 'T5')
    return {
      t5: { ids: t5.map(({ ids }) => ids), mask: t5.map(({ mask }) => mask) },
      clip: this.clip.map((tokenizer, i) => {
        const name = this.clip.length > 1 ? `CLIP ${i + 1}` : 'CLIP'
        return rows(tokenizer, this.clipLength, name).map(({ ids }) => ids)
      }),
    }
  }
}
