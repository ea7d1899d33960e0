import { type ErrorCode, PyraflowError } from '../engine/errors.ts'

/** The fields of a published flux-variant config.json that the network reads, by their own names. */
export interface FluxConfig {
  /** Only widens `proj_out`; patches are always 2×2. */
  patch_size: number
  /** Latent channels × 4. */
  in_channels: number
  num_layers: number
  num_single_layers: number
  attention_head_dim: number
  num_attention_heads: number
  joint_attention_dim: number
  pooled_projection_dim: number
  /** Head channels rotated by time, y and x. */
  axes_dims_rope: [number, number, number]
  use_flash_attn: boolean
  use_temporal_causal: boolean
  interp_condition_pos: boolean
  use_gradient_checkpointing: boolean
  gradient_checkpointing_ratio: number
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

/**
 * Fills in what `given` lacks and drops what no network field is called.
 *
 * @throws `code` naming the field that no network can have.
 */
export function checkFluxConfig(
  given: Record<string, unknown> | Partial<FluxConfig>,
  code: ErrorCode,
): FluxConfig {
  const fail = (field: string, expected: string, received: unknown): PyraflowError =>
    new PyraflowError(code, {
      what: `config: ${field}`,
      expected,
      received: JSON.stringify(received) ?? 'nothing',
    })
  const source = given as Record<string, unknown>
  const name = source._class_name
  if (name !== undefined && name !== 'PyramidFluxTransformer') {
    throw fail('_class_name', 'PyramidFluxTransformer', name)
  }
  const config: Record<string, unknown> = {}
  for (const [field, standard] of Object.entries(FLUX_DEFAULTS)) {
    const value = source[field] ?? standard
    if (typeof standard === 'boolean' && typeof value !== 'boolean') throw fail(field, 'true or false', value)
    const least = field === 'num_layers' || field === 'num_single_layers' ? 0 : 1
    if (typeof standard === 'number' && field !== 'gradient_checkpointing_ratio') {
      if (!Number.isSafeInteger(value) || (value as number) < least) {
        throw fail(field, `a whole number from ${least}`, value)
      }
    }
    config[field] = Array.isArray(value) ? [...value] : value
  }
  const checked = config as unknown as FluxConfig
  const { axes_dims_rope: axes, attention_head_dim: headDim, gradient_checkpointing_ratio: ratio } = checked
  const even =
    Array.isArray(axes) && axes.length === 3 && axes.every((d) => Number.isInteger(d) && d > 0 && d % 2 === 0)
  if (!even || axes.reduce((n, d) => n + d, 0) !== headDim) {
    throw fail('axes_dims_rope', `three even numbers with the sum ${headDim} of attention_head_dim`, axes)
  }
  if (checked.in_channels % 4 !== 0)
    throw fail('in_channels', 'a multiple of 4, for 2×2 patches', checked.in_channels)
  if (checked.patch_size !== 1)
    throw fail('patch_size', '1, as every published network has', checked.patch_size)
  if (!(ratio >= 0 && ratio <= 1)) throw fail('gradient_checkpointing_ratio', 'a number from 0 to 1', ratio)
  return checked
}

/**
 * Parameters of a network (spec/dit-flux.md eq. 14): 1,972,059,200 for the published miniFLUX configuration.
 *
 * @throws ERR_OPTION for a configuration that fits no network.
 */
export function parameterCount(config: Partial<FluxConfig>): number {
  const c = checkFluxConfig(config, 'ERR_OPTION')
  const dh = c.attention_head_dim
  const d = c.num_attention_heads * dh
  const double = 36 * d ** 2 + 30 * d + 4 * dh
  const single = 15 * d ** 2 + 11 * d + 2 * dh
  // Conditioning (three d×d layers in all, with norm_out's 2d²), embeddings and head.
  const inputs = 256 + c.pooled_projection_dim + c.joint_attention_dim + c.in_channels
  const rest = 4 * d ** 2 + (inputs + 8) * d + (d + 1) * c.in_channels
  return c.num_layers * double + c.num_single_layers * single + rest
}
