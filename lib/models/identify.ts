import { existsSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { nearestName } from '../io/nearest-name.ts'
import { type ModelConfig, readConfig } from '../io/pretrained.ts'
import { openWeights } from '../io/safetensors.ts'
import { FLUX_CLASS } from './flux-config.ts'
import { MMDIT_CLASS } from './mmdit-config.ts'

/** What a checkpoint holds. */
export type ModelKind = 'flux' | 'mmdit' | 'vae' | 't5' | 'clip'

const CLASSES: Record<string, ModelKind> = {
  [FLUX_CLASS]: 'flux',
  [MMDIT_CLASS]: 'mmdit',
  CausalVideoVAE: 'vae',
  T5EncoderModel: 't5',
  CLIPTextModel: 'clip',
  CLIPTextModelWithProjection: 'clip',
}

// One key that every model of a kind has and no other kind does; flux comes before mmdit, whose keys it shares.
const MARKS: readonly (readonly [ModelKind, string])[] = [
  ['flux', 'single_transformer_blocks.0.attn.to_q.weight'],
  ['mmdit', 'pos_embed.proj.weight'],
  ['vae', 'decoder.conv_in.conv.weight'],
  ['t5', 'encoder.block.0.layer.0.SelfAttention.q.weight'],
  ['clip', 'text_model.encoder.layers.0.self_attn.q_proj.weight'],
]

const PREFIXES = ['', 'dit.', 'vae.', 'model.', 'module.']

/**
 * Says what a model folder or weight file holds: by the class that its `config.json` names, else by the names of its
 * tensors.
 *
 * @throws ERR_IO when there is nothing readable, ERR_CHECKPOINT naming the nearest known thing.
 */
export function identify(path: string): ModelKind {
  const config = configOf(path)
  const named = config && classOf(config)
  if (named !== undefined && Object.hasOwn(CLASSES, named)) return CLASSES[named]
  if (named !== undefined) {
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: `${path}: the class in config.json`,
      expected: `one of ${Object.keys(CLASSES).join(', ')}`,
      received: `${named}; nearest is ${nearestName(named, Object.keys(CLASSES))}`,
      remedy: 'Give the folder of one model, for example diffusion_transformer_384p.',
    })
  }
  const { entries } = openWeights(path)
  for (const [kind, mark] of MARKS) {
    if (PREFIXES.some((prefix) => entries.has(prefix + mark))) return kind
  }
  const first = entries.keys().next().value
  const marks = MARKS.map(([, mark]) => mark)
  const near = first === undefined ? undefined : nearestName(first, marks)
  const kind = MARKS.find(([, mark]) => mark === near)?.[0]
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: `${path}: tensor names`,
    expected: `those of ${MARKS.map(([name]) => name).join(', ')}`,
    received: first === undefined ? 'no tensors' : `'${first}', …; nearest is '${near}' of ${kind}`,
    remedy: 'Only models of the Pyramid Flow family are understood.',
  })
}

function configOf(path: string): ModelConfig | undefined {
  const folder = existsSync(path) && statSync(path).isDirectory() ? path : dirname(path)
  return existsSync(join(folder, 'config.json')) ? readConfig(folder) : undefined
}

// diffusers writes _class_name, transformers a list of architectures.
function classOf(config: ModelConfig): string | undefined {
  const { _class_name: name, architectures } = config
  if (typeof name === 'string') return name
  const first = Array.isArray(architectures) ? architectures[0] : undefined
  return typeof first === 'string' ? first : undefined
}
