import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { readJsonObject, readText } from '../io/pretrained.ts'

// Contractions, runs of letters, single digits, runs of other symbols (spec/text.md §3).
const WORDS = "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"

const MARKS = ['<|startoftext|>', '<|endoftext|>'] as const

/**
 * The tokenizer.json of a CLIP folder that holds only vocab.json and merges.txt, as the published models' do.
 *
 * @param config - tokenizer_config.json, whose `added_tokens_decoder` names the tokens that are never split
 * @throws ERR_IO for a missing file; ERR_CHECKPOINT for one that holds no vocabulary or no merges.
 */
export function clipDefinition(
  folder: string,
  config: Record<string, unknown>,
  remedy: string,
): Record<string, unknown> {
  const missing = { expected: 'a file of the tokenizer', remedy }
  const vocab = readJsonObject(join(folder, 'vocab.json'), missing)
  const path = join(folder, 'merges.txt')
  // The first line names the version.
  const lines = readText(path, missing)
    .split(/\r?\n/)
    .filter((line) => line !== '' && !line.startsWith('#version'))
  const merges = lines.map((line) => line.split(' '))
  const odd = merges.findIndex((pair) => pair.length !== 2)
  if (odd >= 0 || merges.length === 0) {
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: path,
      expected: 'two tokens a line',
      received: odd >= 0 ? `'${lines[odd]}'` : 'nothing',
      remedy,
    })
  }
  return {
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'NFC' },
        { type: 'Replace', pattern: { Regex: '\\s+' }, content: ' ' },
        { type: 'Lowercase' },
      ],
    },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Split', pattern: { Regex: WORDS }, behavior: 'Removed', invert: true },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: false },
      ],
    },
    post_processor: null,
    decoder: { type: 'ByteLevel' },
    model: {
      type: 'BPE',
      unk_token: MARKS[1],
      continuing_subword_prefix: '',
      end_of_word_suffix: '</w>',
      fuse_unk: false,
      vocab,
      merges,
    },
    added_tokens: addedTokens(vocab, config),
  }
}

function addedTokens(vocab: Record<string, unknown>, config: Record<string, unknown>): unknown[] {
  const plain = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }
  const listed = config.added_tokens_decoder
  if (typeof listed === 'object' && listed !== null && !Array.isArray(listed)) {
    return Object.entries(listed).map(([id, token]) => ({
      ...plain,
      ...(token as object),
      // The lower-casing that normalisation means here would only hide the marks.
      normalized: false,
      id: Number(id),
    }))
  }
  return MARKS.filter((mark) => mark in vocab).map((content) => ({ ...plain, content, id: vocab[content] }))
}
