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

/** `_class_name` of the flux variant. */
export const FLUX_CLASS = 'PyramidFluxTransformer'

/** The fields of a published flux-variant config.json that the network reads, by their own names. */
export interface FluxConfig extends NetworkConfig {
  /** Only widens `proj_out`; patches are always 2×2. */
  patch_size: number
  /** Latent channels × 4. */
  in_channels: number
  num_single_layers: number
  /** Head channels rotated by time, y and x. */
  axes_dims_rope: [number, number, number]
  use_flash_attn: boolean
  interp_condition_pos: boolean
}

/** Defaults of the published class; they describe a larger network than the published one. */
export const FLUX_DEFAULTS: Readonly<FluxConfig> = Object.freeze<FluxConfig>({
  patch_size: 1,
  in_channels: 64,
  num_layers: 19,
  num_single_layers: 38,
  attention_head_dim: 64,
  num_attention_heads: 24,
  joint_attention_dim: 4096,
  pooled_projection_dim: 768,
  axes_dims_rope: [16, 24, 24],
  use_flash_attn: false,
  use_temporal_causal: true,
  interp_condition_pos: true,
  use_gradient_checkpointing: false,
  gradient_checkpointing_ratio: 0.6,
})

const RULES: FieldRules<FluxConfig> = {
  className: FLUX_CLASS,
  defaults: FLUX_DEFAULTS,
  countsFromZero: ['num_layers', 'num_single_layers'],
}

/**
 * Fills in what `given` lacks and drops what no network field is called.
 *
 * @throws `code` naming the field that no network can have.
 */
export function checkFluxConfig(
  given: Record<string, unknown> | Partial<FluxConfig>,
  code: ErrorCode,
): FluxConfig {
  const fail = fieldError(code)
  const checked = readFields(given, RULES, fail)
  const { axes_dims_rope: axes, attention_head_dim: headDim } = checked
  const even =
    Array.isArray(axes) && axes.length === 3 && axes.every((d) => Number.isInteger(d) && d > 0 && d % 2 === 0)
  if (!even || axes.reduce((n, d) => n + d, 0) !== headDim) {
    throw fail('axes_dims_rope', `three even numbers with the sum ${headDim} of attention_head_dim`, axes)
  }
  if (checked.in_channels % 4 !== 0)
    throw fail('in_channels', 'a multiple of 4, for 2×2 patches', checked.in_channels)
  if (checked.patch_size !== 1)
    throw fail('patch_size', '1, as every published network has', checked.patch_size)
  return checked
}

/**
 * Parameters of a network (spec/dit-flux.md eq. 14): 1,972,059,200 for the published miniFLUX configuration.
 *
 * @throws ERR_OPTION for a configuration that fits no network.
 */
export function parameterCount(config: Partial<FluxConfig>): number {
  const c = checkFluxConfig(config, 'ERR_OPTION')
  const sizes = parameterSizes(c, c.in_channels)
  const { width: d, headDim } = sizes
  const single = 15 * d ** 2 + 11 * d + 2 * headDim
  return c.num_layers * doubleBlockParameters(sizes) + c.num_single_layers * single + outerParameters(sizes)
}
