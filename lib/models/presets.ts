import type { FluxConfig } from './flux-config.ts'
import { MMDIT_DEFAULTS, type MmditConfig } from './mmdit-config.ts'

/** `config.json` of the published miniFLUX transformers; 384p, 768p and image share it. */
export const miniFluxConfig: Readonly<FluxConfig> = Object.freeze<FluxConfig>({
  patch_size: 1,
  in_channels: 64,
  num_layers: 8,
  num_single_layers: 16,
  attention_head_dim: 64,
  num_attention_heads: 30,
  joint_attention_dim: 4096,
  pooled_projection_dim: 768,
  axes_dims_rope: [16, 24, 24],
  use_flash_attn: false,
  use_temporal_causal: true,
  interp_condition_pos: true,
  use_gradient_checkpointing: false,
  gradient_checkpointing_ratio: 0.6,
})

/** `config.json` of the published SD3-variant transformers, with the loader's settings; 384p and 768p share it. */
export const sd3MmditConfig: Readonly<MmditConfig> = MMDIT_DEFAULTS

/** z_norm = (z − shift)·scale, with one pair for images and first frames and another for later frames. */
export interface NormalisationConstants {
  readonly image: { readonly shift: number; readonly scale: number }
  readonly video: { readonly shift: number; readonly scale: number }
}

/** Latent normalisation by network family (spec/method.md eq. 32). */
export const latentNormalisation: Readonly<Record<'flux' | 'mmdit', NormalisationConstants>> = Object.freeze({
  flux: { image: { shift: -0.04, scale: 1 / 1.8726 }, video: { shift: -0.2343, scale: 1 / 3.0986 } },
  mmdit: { image: { shift: 0.149, scale: 1 / 1.8415 }, video: { shift: -0.2343, scale: 1 / 3.0986 } },
})

/** Appended to every prompt at inference, never in training. */
export const promptSuffix = ', hyper quality, Ultra HD, 8K'

export const defaultNegativePrompt: string =
  'cartoon style, worst quality, low quality, blurry, absolute black, absolute white, low res, extra limbs, ' +
  'extra digits, misplaced objects, mutated anatomy, monochrome, horror'

/** Sampling settings the authors recommend (spec/method.md §10). */
export interface SamplingPreset {
  /** Steps of each stage for the first unit (the image). */
  readonly steps: readonly number[]
  /** Steps of each stage for later units. */
  readonly videoSteps: readonly number[]
  /** Guidance scale of the first unit. */
  readonly guidance: number
  /** Guidance scale of later units. */
  readonly videoGuidance: number
}

/** Recommended settings by task; the clip's own frames are the first unit of `imageToVideo`. */
export const samplingPresets: Readonly<Record<'textToVideo' | 'imageToVideo' | 'image', SamplingPreset>> =
  Object.freeze({
    textToVideo: { steps: [20, 20, 20], videoSteps: [10, 10, 10], guidance: 7, videoGuidance: 5 },
    imageToVideo: { steps: [10, 10, 10], videoSteps: [10, 10, 10], guidance: 7, videoGuidance: 4 },
    image: { steps: [20, 20, 20], videoSteps: [10, 10, 10], guidance: 9, videoGuidance: 5 },
  })

/** Sizes (width, height in pixels) that the published models were trained for. */
export const recommendedSizes: Readonly<
  Record<'384p' | '768p' | 'image', readonly (readonly [number, number])[]>
> = Object.freeze({
  '384p': [[640, 384]],
  '768p': [[1280, 768]],
  image: [
    [1024, 1024],
    [1280, 768],
    [768, 1280],
  ],
})

/** Longest video, in units of latent frames, that each published variant was trained for. */
export const longestTemp: Readonly<Record<'384p' | '768p', number>> = Object.freeze({
  '384p': 16,
  '768p': 31,
})

/** Frames a second of the published models' videos. */
export const framesPerSecond = 24
