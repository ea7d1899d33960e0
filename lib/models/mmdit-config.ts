import type { ErrorCode } from '../engine/errors.ts'
import {
  doubleBlockParameters,
  type FieldRules,
  fieldError,
  outerParameters,
  parameterSizes,
  readFields,
} from './config-fields.ts'
import type { NetworkConfig } from './velocity-network.ts'

/** `_class_name` of the SD3 variant. */
export const MMDIT_CLASS = 'PyramidDiffusionMMDiT'

/** The fields of a published SD3-variant config.json that the network reads, by their own names. */
export interface MmditConfig extends NetworkConfig {
  /** Latent side whose patches lie at distance 1 in the position table. */
  sample_size: number
  patch_size: number
  /** Latent channels. */
  in_channels: number
  /** Width of text after its embedding: that of all tokens. */
  caption_projection_dim: number
  /** Side of the position table, in patches: the largest grid that the network takes. */
  pos_embed_max_size: number
  /** Size of a table that networks with rotary time positions do not have. */
  max_num_frames: number
  qk_norm: string
  pos_embed_type: string
  temp_pos_embed_type: string
  add_temp_pos_embed: boolean
  use_t5_mask: boolean
  /** Whether history takes its positions from the last clip's grid, instead of a window of its own size. */
  interp_condition_pos: boolean
  use_flash_attn: boolean
}

/**
 * What absent fields stand for: defaults of the published class, with the settings that the reference's loader makes over
 * it, without which the network would know no time, and a caption width that fits.
 */
export const MMDIT_DEFAULTS: Readonly<MmditConfig> = Object.freeze<MmditConfig>({
  sample_size: 128,
  patch_size: 2,
  in_channels: 16,
  num_layers: 24,
  attention_head_dim: 64,
  num_attention_heads: 24,
  caption_projection_dim: 1536,
  joint_attention_dim: 4096,
  pooled_projection_dim: 2048,
  pos_embed_max_size: 192,
  max_num_frames: 200,
  qk_norm: 'rms_norm',
  pos_embed_type: 'sincos',
  temp_pos_embed_type: 'rope',
  add_temp_pos_embed: true,
  use_t5_mask: true,
  interp_condition_pos: true,
  use_flash_attn: false,
  use_temporal_causal: true,
  use_gradient_checkpointing: false,
  gradient_checkpointing_ratio: 0.6,
})

const RULES: FieldRules<MmditConfig> = {
  className: MMDIT_CLASS,
  defaults: MMDIT_DEFAULTS,
  countsFromZero: [],
}

// Alternatives of the published class that no published network uses.
const FIXED = [
  'patch_size',
  'qk_norm',
  'pos_embed_type',
  'temp_pos_embed_type',
  'add_temp_pos_embed',
  'use_t5_mask',
] as const

/**
 * Fills in what `given` lacks and drops what no network field is called.
 *
 * @throws `code` naming the field that no network can have, or whose value no published network uses.
 */
export function checkMmditConfig(
  given: Record<string, unknown> | Partial<MmditConfig>,
  code: ErrorCode,
): MmditConfig {
  const fail = fieldError(code)
  const checked = readFields(given, RULES, fail)
  const source = given as Record<string, unknown>
  for (const field of FIXED) {
    const value = source[field]
    if (value === undefined || value === MMDIT_DEFAULTS[field]) continue
    throw fail(field, `${MMDIT_DEFAULTS[field]}, as every published network has`, value)
  }
  const { attention_head_dim: headDim, use_flash_attn: flash, use_temporal_causal: causal } = checked
  const width = checked.num_attention_heads * headDim
  checked.caption_projection_dim = (source.caption_projection_dim as number | undefined) ?? width
  if (checked.caption_projection_dim !== width) {
    const expected = `num_attention_heads · attention_head_dim = ${width}`
    throw fail('caption_projection_dim', expected, checked.caption_projection_dim)
  }
  if (headDim % 2 !== 0) throw fail('attention_head_dim', 'an even number, whose halves are rotated', headDim)
  if (width % 4 !== 0) throw fail('num_attention_heads', 'a width that is a multiple of 4', width)
  if (flash && causal) throw fail('use_flash_attn', 'false beside use_temporal_causal', flash)
  return checked
}

/**
 * Parameters of a network, without its position table: 2,028,334,144 for the published configuration.
 *
 * @throws ERR_OPTION for a configuration that fits no network.
 */
export function mmditParameterCount(config: Partial<MmditConfig>): number {
  const c = checkMmditConfig(config, 'ERR_OPTION')
  const sizes = parameterSizes(c, 4 * c.in_channels)
  const { width: d } = sizes
  // The last block lacks four of six modulation vectors, the output projection and the FF of the text stream.
  const missing = 13 * d ** 2 + 10 * d
  return c.num_layers * doubleBlockParameters(sizes) - missing + outerParameters(sizes)
}
