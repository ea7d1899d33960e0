import { join } from 'node:path'
import { clipClasses } from './clip-text.ts'
import { TextConfig } from './network.ts'
import { textLayoutOf, textLayouts } from './prompt-networks.ts'
import { promptLength } from './prompt-tokenizers.ts'
import { T5_CLASSES } from './t5-encoder.ts'

/** What a text encoder takes. */
export interface TextMemory {
  /** Bytes that stay from the first prompt on. */
  readonly kept: number
  /** Bytes that prompts take besides while they are encoded. */
  readonly peak: number
  readonly flops: number
}

/**
 * What the text encoders of a model folder take for so many prompts, by their config.json.
 *
 * @param bytes - of a number computed with
 * @param keep - whether the networks stay in memory; else T5 is there a layer at a time
 * @throws ERR_IO, ERR_CHECKPOINT
 */
export function promptMemory(
  dir: string,
  how: { prompts: number; bytes: number; keep: boolean },
): TextMemory {
  const { prompts, bytes, keep } = how
  const { clip, projection, t5 } = textLayouts[textLayoutOf(dir)]
  const clips = clip.map((suffix) => {
    const c = new TextConfig(join(dir, `text_encoder${suffix}`), clipClasses(projection))
    const [d, f, n] = [c.size('hidden_size'), c.size('intermediate_size'), c.size('num_hidden_layers')]
    const length = c.size('max_position_embeddings')
    const layers = n * (4 * d ** 2 + 2 * d * f + f + 9 * d)
    const tables = (c.size('vocab_size') + length + 2) * d
    return { layers, all: layers + tables + (projection ? d * c.size('projection_dim') : 0), length }
  })
  const c = new TextConfig(join(dir, `text_encoder${t5}`), T5_CLASSES)
  const [d, f, n] = [c.size('d_model'), c.size('d_ff'), c.size('num_layers')]
  const heads = c.size('num_heads')
  const row = promptLength(dir)
  const layer = 4 * d * heads * c.size('d_kv') + 3 * d * f + 2 * d
  const table = c.size('vocab_size') * d
  const clipSize = clips.reduce((sum, { all }) => sum + all, 0)
  // One prompt's layer at work, the states of all, and the bias of T5 as channels of three operands.
  const work = row * (3 * f + 8 * d + prompts * (d + 3 * heads * (row + 1)))
  const passing = keep ? 0 : clipSize + layer + (bytes === 4 ? table : 0)
  const products = clips.reduce((sum, { layers, length }) => sum + layers * length, n * layer * row)
  return {
    kept: keep ? bytes * (clipSize + n * layer + table + d) : 0,
    peak: bytes * (passing + work),
    flops: 2 * prompts * products,
  }
}
