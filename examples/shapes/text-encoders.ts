import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { engine, Generator, Tensor } from '../../lib/index.ts'
import { writeFileAtomically } from '../../lib/io/atomic.ts'
import { type TensorToWrite, writeSafetensors } from '../../lib/io/write-safetensors.ts'
import { VOCABULARY } from './world.ts'

// The toy model's text encoders: CLIP and T5 as the published flux model has them, in the same folders, narrow, frozen at
// random weights. That is enough for a closed world: states still tell words apart, and the transformer learns what they
// mean, as it does with the published encoders.

/** Words that no caption of the world has, for a world that is extended; whatever else is spelled by its letters. */
const SPARE = 'orange purple pink brown turquoise star ring heart diamond spinning'.split(' ')
const WORDS = [...VOCABULARY, ...SPARE]
const LETTERS = [...'abcdefghijklmnopqrstuvwxyz']

/** Tokens of a row: a caption has nine words. */
const LENGTH = 12
const WIDTH = 64
const HEADS = 4
const LAYERS = 2

const special = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }

/** The seed of the committed model's text encoders. */
export const TEXT_SEED = 7

/** Writes `text_encoder`, `tokenizer`, `text_encoder_2` and `tokenizer_2` of a model folder. */
export async function writeTextEncoders(dir: string, seed: number): Promise<void> {
  const generator = new Generator(seed)
  const clip = await writeClipTokenizer(join(dir, 'tokenizer'))
  await writeClip(join(dir, 'text_encoder'), clip, generator.stream('clip'))
  const t5 = await writeT5Tokenizer(join(dir, 'tokenizer_2'))
  await writeT5(join(dir, 'text_encoder_2'), t5, generator.stream('t5'))
}

async function writeText(folder: string, name: string, content: unknown): Promise<void> {
  mkdirSync(folder, { recursive: true })
  const text = typeof content === 'string' ? content : JSON.stringify(content, null, 1)
  await writeFileAtomically(join(folder, name), `${text}\n`)
}

/** Unigrams over words that begin with ▁. Returns the number of pieces. */
async function writeT5Tokenizer(folder: string): Promise<number> {
  const marks = ['<pad>', '</s>', '<unk>']
  const pieces = [...marks, ...WORDS.map((word) => `▁${word}`), '▁', ...LETTERS]
  const score = (i: number): number => (i < marks.length ? 0 : i < marks.length + WORDS.length ? -1 : -5)
  const words = { replacement: '▁', add_prefix_space: true, prepend_scheme: 'always' }
  await writeText(folder, 'tokenizer.json', {
    normalizer: { type: 'Lowercase' },
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [{ type: 'WhitespaceSplit' }, { type: 'Metaspace', ...words }],
    },
    post_processor: null,
    decoder: { type: 'Metaspace', ...words },
    model: { type: 'Unigram', unk_id: 2, vocab: pieces.map((piece, i) => [piece, score(i)]) },
    added_tokens: marks.map((content, id) => ({ ...special, id, content })),
  })
  await writeText(folder, 'tokenizer_config.json', {
    eos_token: '</s>',
    pad_token: '<pad>',
    model_max_length: LENGTH,
  })
  return pieces.length
}

/** Pairs of bytes, merged until every word is one token. Returns the ids of the marks. */
async function writeClipTokenizer(folder: string): Promise<{ bos: number; eos: number }> {
  const vocab = ['!', ...LETTERS, ...LETTERS.map((letter) => `${letter}</w>`)]
  const merges: string[] = []
  for (const word of WORDS) {
    let pieces = pairsMerged([...word.slice(0, -1), `${word.at(-1)}</w>`], merges)
    // A later merge ranks below all earlier ones, so that words which are whole stay whole.
    while (pieces.length > 1) {
      const [first, second, ...rest] = pieces as [string, string, ...string[]]
      merges.push(`${first} ${second}`)
      vocab.push(first + second)
      pieces = [first + second, ...rest]
    }
  }
  const [bos, eos] = ['<|startoftext|>', '<|endoftext|>']
  vocab.push(bos, eos)
  const ids = { bos: vocab.length - 2, eos: vocab.length - 1 }
  await writeText(folder, 'vocab.json', Object.fromEntries(vocab.map((token, i) => [token, i])))
  await writeText(folder, 'merges.txt', ['#version: 0.2', ...merges].join('\n'))
  await writeText(folder, 'tokenizer_config.json', {
    bos_token: bos,
    eos_token: eos,
    pad_token: eos,
    model_max_length: LENGTH,
  })
  return ids
}

/** What the merges make of a word: always the earliest in the list that fits, as the tokenizer does. */
function pairsMerged(word: readonly string[], merges: readonly string[]): string[] {
  let pieces = [...word]
  for (;;) {
    const ranks = pieces.slice(1).map((piece, i) => merges.indexOf(`${pieces[i]} ${piece}`))
    const found = ranks.filter((rank) => rank >= 0)
    if (found.length === 0) return pieces
    const at = ranks.indexOf(Math.min(...found))
    pieces = [...pieces.slice(0, at), `${pieces[at]}${pieces[at + 1]}`, ...pieces.slice(at + 2)]
  }
}

/** Weights by name, in bf16: normal with some deviation, or all of one value. */
class Drawing {
  readonly #tensors = new Map<string, Tensor>()
  readonly #generator: Generator

  constructor(generator: Generator) {
    this.#generator = generator
  }

  normal(name: string, shape: readonly number[], std: number): void {
    this.#tensors.set(name, this.#generator.normal(shape, { std, dtype: 'bf16' }))
  }

  all(value: number, ...names: readonly string[]): void {
    for (const name of names) this.#tensors.set(name, Tensor.full([WIDTH], value, 'bf16'))
  }

  async write(folder: string): Promise<void> {
    const tensors: TensorToWrite[] = []
    for (const [name, tensor] of this.#tensors) {
      const data = new Uint16Array(tensor.size)
      await engine.read(tensor.storage, tensor.byteOffset, data)
      tensors.push({ name, dtype: 'BF16', shape: tensor.shape, data })
      tensor.dispose()
    }
    await writeSafetensors(join(folder, 'model.safetensors'), tensors)
  }
}

async function writeT5(folder: string, vocabulary: number, generator: Generator): Promise<void> {
  const [hidden, headDim] = [2 * WIDTH, WIDTH / HEADS]
  await writeText(folder, 'config.json', {
    architectures: ['T5EncoderModel'],
    d_model: WIDTH,
    d_kv: headDim,
    d_ff: hidden,
    num_heads: HEADS,
    num_layers: LAYERS,
    vocab_size: vocabulary,
    layer_norm_epsilon: 1e-6,
    feed_forward_proj: 'gated-gelu',
    relative_attention_num_buckets: 32,
    relative_attention_max_distance: 128,
  })
  const weights = new Drawing(generator)
  weights.normal('shared.weight', [vocabulary, WIDTH], 1)
  weights.normal('encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight', [32, HEADS], 1)
  for (let i = 0; i < LAYERS; i++) {
    const block = `encoder.block.${i}.layer`
    weights.all(1, `${block}.0.layer_norm.weight`, `${block}.1.layer_norm.weight`)
    // T5's own start: logits are not divided by √d, so that the queries are small instead.
    weights.normal(`${block}.0.SelfAttention.q.weight`, [WIDTH, WIDTH], (WIDTH * headDim) ** -0.5)
    for (const name of ['k', 'v', 'o'])
      weights.normal(`${block}.0.SelfAttention.${name}.weight`, [WIDTH, WIDTH], WIDTH ** -0.5)
    for (const name of ['wi_0', 'wi_1'])
      weights.normal(`${block}.1.DenseReluDense.${name}.weight`, [hidden, WIDTH], WIDTH ** -0.5)
    weights.normal(`${block}.1.DenseReluDense.wo.weight`, [WIDTH, hidden], hidden ** -0.5)
  }
  weights.all(1, 'encoder.final_layer_norm.weight')
  await weights.write(folder)
}

async function writeClip(
  folder: string,
  marks: { bos: number; eos: number },
  generator: Generator,
): Promise<void> {
  const hidden = 2 * WIDTH
  const vocabulary = marks.eos + 1
  await writeText(folder, 'config.json', {
    architectures: ['CLIPTextModel'],
    hidden_size: WIDTH,
    intermediate_size: hidden,
    num_hidden_layers: LAYERS,
    num_attention_heads: HEADS,
    max_position_embeddings: LENGTH,
    vocab_size: vocabulary,
    layer_norm_eps: 1e-5,
    hidden_act: 'quick_gelu',
    bos_token_id: marks.bos,
    eos_token_id: marks.eos,
  })
  const weights = new Drawing(generator)
  // Embeddings as small as CLIP's leave the state at the end of the text to what it attends to: all words.
  weights.normal('text_model.embeddings.token_embedding.weight', [vocabulary, WIDTH], 0.02)
  weights.normal('text_model.embeddings.position_embedding.weight', [LENGTH, WIDTH], 0.01)
  const layer = (name: string, outputs: number, inputs: number): void => {
    weights.normal(`${name}.weight`, [outputs, inputs], inputs ** -0.5)
    weights.normal(`${name}.bias`, [outputs], 0.02)
  }
  const norm = (name: string): void => {
    weights.all(1, `${name}.weight`)
    weights.all(0, `${name}.bias`)
  }
  for (let i = 0; i < LAYERS; i++) {
    const block = `text_model.encoder.layers.${i}`
    norm(`${block}.layer_norm1`)
    norm(`${block}.layer_norm2`)
    for (const name of ['q', 'k', 'v', 'out']) layer(`${block}.self_attn.${name}_proj`, WIDTH, WIDTH)
    layer(`${block}.mlp.fc1`, hidden, WIDTH)
    layer(`${block}.mlp.fc2`, WIDTH, hidden)
  }
  norm('text_model.final_layer_norm')
  await weights.write(folder)
}
