import type { CausalVaeConfig, FluxConfig } from '../../lib/index.ts'

/** The published VAE, narrow: 8×8×8 compression into 16 channels. */
export const vaeConfig: Partial<CausalVaeConfig> = {
  encoder_block_out_channels: [16, 16, 32, 48],
  encoder_layers_per_block: [1, 1, 1, 1],
  encoder_norm_num_groups: 2,
  decoder_block_out_channels: [16, 16, 32, 48],
  decoder_layers_per_block: [1, 1, 1, 1],
  decoder_norm_num_groups: 2,
}

/** The published transformer, narrow: 3.5 million parameters. */
export const ditConfig: Partial<FluxConfig> = {
  num_layers: 2,
  num_single_layers: 4,
  attention_head_dim: 32,
  num_attention_heads: 5,
  joint_attention_dim: 64,
  pooled_projection_dim: 64,
  axes_dims_rope: [8, 12, 12],
}
