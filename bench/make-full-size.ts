import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { engine } from '../lib/engine/engine.ts'
import { rehearse } from '../lib/engine/rehearsal.ts'
import { writePretrained } from '../lib/io/pretrained.ts'
import { type TensorToWrite, writeSafetensors } from '../lib/io/write-safetensors.ts'
import { CAUSAL_VAE_DEFAULTS, CausalVideoVAE } from '../lib/models/causal-vae.ts'
import { PyramidFluxTransformer } from '../lib/models/dit-flux.ts'
import { miniFluxConfig } from '../lib/models/presets.ts'
import { Generator } from '../lib/tensor/generator.ts'
import type { Tensor } from '../lib/tensor/tensor.ts'

// Writes a model folder of the published sizes and layout with random weights: what memory and time depend on, without
// a download. About 19 GB; one tensor in memory at a time.
//   node dist/bench/make-full-size.js --out DIR [--seed N] [--part NAME]...

type Shapes = Iterable<readonly [string, readonly number[]]>

const T5 = { d_model: 4096, num_heads: 64, d_kv: 64, d_ff: 10_240, num_layers: 24, vocab_size: 32_128 }
const CLIP = { hidden_size: 768, num_attention_heads: 12, intermediate_size: 3072, num_hidden_layers: 12 }
const VOCABULARY = 49_408
const POSITIONS = 77

function* t5Shapes(): Shapes {
  const { d_model: d, d_ff: f, num_heads: heads, d_kv } = T5
  yield ['shared.weight', [T5.vocab_size, d]]
  for (let i = 0; i < T5.num_layers; i++) {
    const [own, feed] = [0, 1].map((n) => `encoder.block.${i}.layer.${n}.`)
    for (const name of ['q', 'k', 'v']) yield [`${own}SelfAttention.${name}.weight`, [heads * d_kv, d]]
    yield [`${own}SelfAttention.o.weight`, [d, heads * d_kv]]
    if (i === 0) yield [`${own}SelfAttention.relative_attention_bias.weight`, [32, heads]]
    yield [`${own}layer_norm.weight`, [d]]
    for (const name of ['wi_0', 'wi_1']) yield [`${feed}DenseReluDense.${name}.weight`, [f, d]]
    yield [`${feed}DenseReluDense.wo.weight`, [d, f]]
    yield [`${feed}layer_norm.weight`, [d]]
  }
  yield ['encoder.final_layer_norm.weight', [d]]
}

function* clipShapes(): Shapes {
  const { hidden_size: d, intermediate_size: f } = CLIP
  const both = (name: string, shape: readonly number[]): (readonly [string, readonly number[]])[] => [
    [`${name}.weight`, shape],
    [`${name}.bias`, [shape[0] as number]],
  ]
  yield ['text_model.embeddings.token_embedding.weight', [VOCABULARY, d]]
  yield ['text_model.embeddings.position_embedding.weight', [POSITIONS, d]]
  for (let i = 0; i < CLIP.num_hidden_layers; i++) {
    const at = `text_model.encoder.layers.${i}`
    for (const name of ['q_proj', 'k_proj', 'v_proj', 'out_proj'])
      yield* both(`${at}.self_attn.${name}`, [d, d])
    yield* both(`${at}.layer_norm1`, [d])
    yield* both(`${at}.layer_norm2`, [d])
    yield* both(`${at}.mlp.fc1`, [f, d])
    yield* both(`${at}.mlp.fc2`, [d, f])
  }
  yield* both('text_model.final_layer_norm', [d])
}

/** Names and shapes of a network's parameters; no weight is made. */
function shapesOf(make: () => { parameters: ReadonlyMap<string, Tensor> }): Shapes {
  return rehearse(engine, () => Array.from(make().parameters, ([name, { shape }]) => [name, shape] as const))
}

/** Tensors whose values pass signals on without growing: matrices by fan-in, norms around 1, small biases. */
function drawn(shapes: Shapes, dtype: 'f32' | 'bf16', generator: Generator): TensorToWrite[] {
  return Array.from(shapes, ([name, shape]) => ({
    name,
    dtype: dtype === 'f32' ? 'F32' : 'BF16',
    shape,
    data: async () => {
      const norm = shape.length === 1 && /norm.*weight$/.test(name)
      const table = /embedding\.weight$|^shared/.test(name)
      const fanIn = shape.slice(1).reduce((a, b) => a * b, 1)
      const std = table ? 0.3 : shape.length > 1 ? 1 / Math.sqrt(fanIn) : 0.02
      const values = generator.stream(name).normal(shape, { dtype, mean: norm ? 1 : 0, std })
      const target = dtype === 'f32' ? new Float32Array(values.size) : new Uint16Array(values.size)
      await engine.read(values.storage, values.byteOffset, target)
      values.dispose()
      return target
    },
  }))
}

const json = (path: string, value: unknown): void =>
  writeFileSync(path, `${JSON.stringify(value, null, 2)}\n`)

const special = { single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }
const letters = Array.from({ length: 26 }, (_, i) => String.fromCharCode(97 + i))

// Tokenizers of letters: prompts get as many tokens as they have letters, and the networks do not mind.
function writeT5Tokenizer(dir: string): void {
  const pieces = ['<pad>', '</s>', '<unk>', '▁', ...letters]
  json(join(dir, 'tokenizer.json'), {
    normalizer: null,
    pre_tokenizer: { type: 'Metaspace', replacement: '▁', add_prefix_space: true, prepend_scheme: 'always' },
    post_processor: null,
    decoder: { type: 'Metaspace', replacement: '▁', add_prefix_space: true },
    model: { type: 'Unigram', unk_id: 2, vocab: pieces.map((piece, i) => [piece, i < 3 ? 0 : -3]) },
    added_tokens: pieces.slice(0, 3).map((content, id) => ({ ...special, id, content })),
  })
  json(join(dir, 'tokenizer_config.json'), { eos_token: '</s>', pad_token: '<pad>', model_max_length: 512 })
}

function writeClipTokenizer(dir: string): void {
  const marks = { 49406: '<|startoftext|>', 49407: '<|endoftext|>' }
  const words = [...letters, ...letters.map((c) => `${c}</w>`)]
  const vocabulary = Object.fromEntries([
    ...words.map((word, i) => [word, i]),
    ['<|startoftext|>', 49406],
    ['<|endoftext|>', 49407],
  ])
  json(join(dir, 'vocab.json'), vocabulary)
  writeFileSync(join(dir, 'merges.txt'), '#version: 0.2\na b\n')
  json(join(dir, 'tokenizer_config.json'), {
    bos_token: '<|startoftext|>',
    eos_token: '<|endoftext|>',
    pad_token: '<|endoftext|>',
    model_max_length: POSITIONS,
    added_tokens_decoder: Object.fromEntries(
      Object.entries(marks).map(([id, content]) => [id, { ...special, content }]),
    ),
  })
}

async function writeT5(dir: string, generator: Generator): Promise<void> {
  const tensors = drawn(t5Shapes(), 'bf16', generator)
  const half = tensors.findIndex(({ name }) => name.startsWith('encoder.block.12.'))
  const shards = [tensors.slice(0, half), tensors.slice(half)]
  const map: Record<string, string> = {}
  for (const [i, shard] of shards.entries()) {
    const file = `model-0000${i + 1}-of-00002.safetensors`
    await writeSafetensors(join(dir, file), shard, { format: 'pt' })
    for (const { name } of shard) map[name] = file
  }
  json(join(dir, 'model.safetensors.index.json'), { metadata: {}, weight_map: map })
  json(join(dir, 'config.json'), {
    architectures: ['T5EncoderModel'],
    ...T5,
    layer_norm_epsilon: 1e-6,
    feed_forward_proj: 'gated-gelu',
    relative_attention_num_buckets: 32,
    relative_attention_max_distance: 128,
  })
}

async function writeClip(dir: string, generator: Generator): Promise<void> {
  await writeSafetensors(join(dir, 'model.safetensors'), drawn(clipShapes(), 'bf16', generator), {
    format: 'pt',
  })
  json(join(dir, 'config.json'), {
    architectures: ['CLIPTextModel'],
    ...CLIP,
    vocab_size: VOCABULARY,
    max_position_embeddings: POSITIONS,
    layer_norm_eps: 1e-5,
    hidden_act: 'quick_gelu',
    eos_token_id: 49407,
    projection_dim: 768,
  })
}

async function run(): Promise<void> {
  const { values } = parseArgs({
    options: {
      out: { type: 'string' },
      seed: { type: 'string', default: '1' },
      part: { type: 'string', multiple: true },
    },
  })
  const { out, part } = values
  if (out === undefined) throw new Error('--out names the folder to write')
  const generator = new Generator(Number(values.seed))
  const parts: Record<string, (dir: string) => unknown> = {
    tokenizer: writeClipTokenizer,
    tokenizer_2: writeT5Tokenizer,
    causal_video_vae: (dir) => {
      const shapes = shapesOf(() => CausalVideoVAE.create({}, { generator }))
      const config = { _class_name: 'CausalVideoVAE', ...CAUSAL_VAE_DEFAULTS }
      return writePretrained(dir, config, drawn(shapes, 'f32', generator.stream('vae')))
    },
    diffusion_transformer_384p: (dir) => {
      const shapes = shapesOf(() => PyramidFluxTransformer.create(miniFluxConfig, { seed: 1 }))
      const config = { _class_name: 'PyramidFluxTransformer', ...miniFluxConfig }
      return writePretrained(dir, config, drawn(shapes, 'f32', generator.stream('dit')))
    },
    text_encoder: (dir) => writeClip(dir, generator.stream('clip')),
    text_encoder_2: (dir) => writeT5(dir, generator.stream('t5')),
  }
  for (const [name, write] of Object.entries(parts)) {
    if (part && !part.includes(name)) continue
    const began = performance.now()
    mkdirSync(join(out, name), { recursive: true })
    await write(join(out, name))
    process.stderr.write(`${name}: ${((performance.now() - began) / 1000).toFixed(1)} s\n`)
  }
}

run().catch((error: unknown) => {
  process.stderr.write(`${error instanceof Error ? error.message : error}\n`)
  process.exitCode = 1
})
