import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { readConfig } from '../io/pretrained.ts'
import type { TextEncoder } from './encoder.ts'
import { architectureOf } from './network.ts'
import { PromptEncoder, type PromptEncoderOptions } from './prompt-encoder.ts'
import { WordEncoder } from './word-encoder.ts'

const CLIP = ['CLIPTextModel', 'CLIPTextModelWithProjection', 'clip_text_model']

/**
 * Loads the text encoder of a model folder, whatever its kind: the word encoder of toy models in `text_encoder`, or
 * the networks and tokenizers of a published one in `text_encoder`, `tokenizer` and their numbered companions.
 *
 * @throws ERR_IO when a folder or file is missing; ERR_CHECKPOINT when one holds something else.
 */
export async function loadTextEncoder(dir: string, options: PromptEncoderOptions = {}): Promise<TextEncoder> {
  const folder = join(dir, 'text_encoder')
  const name = architectureOf(readConfig(folder))
  if (name === 'WordEncoder') return WordEncoder.fromPretrained(folder)
  if (name !== undefined && CLIP.includes(name)) return PromptEncoder.fromPretrained(dir, options)
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: `text encoder ${folder}`,
    expected: ['WordEncoder', ...CLIP].join(' or '),
    received: name ?? 'no architecture',
    remedy: 'Give the folder of a whole model: the one that holds text_encoder and diffusion_transformer….',
  })
}
