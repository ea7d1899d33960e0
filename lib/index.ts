/** pyraflow: pyramidal flow matching for video. Training lives in `pyraflow/train`. */
export { type EngineOptions, engine } from './engine/engine.ts'
export { type ErrorCode, PyraflowError } from './engine/errors.ts'
export type { LatentNormalisation } from './flow/normalise.ts'
export { makeStages, type StageOptions, type Stages, stageSteps } from './flow/stages.ts'
export { type GenerateEvent, Generation } from './generate/generation.ts'
export type { LatentClip } from './generate/latents.ts'
export type { ContinueSource, GenerateOptions, PromptChange, RawClip } from './generate/options.ts'
export { type Recipe, readRecipe } from './generate/recipe.ts'
export { type SaveVideoOptions, Video } from './generate/video.ts'
export type { ImageSource, RawImage } from './io/image.ts'
export { type CausalVaeConfig, CausalVideoVAE, type Posterior } from './models/causal-vae.ts'
export { PyramidFluxTransformer } from './models/dit-flux.ts'
export { PyramidDiffusionMMDiT } from './models/dit-mmdit.ts'
export type { FluxConfig } from './models/flux-config.ts'
export { loadVelocityNetwork } from './models/load-network.ts'
export type { MmditConfig } from './models/mmdit-config.ts'
export type { VaePieces, VaePlan } from './models/vae-plan.ts'
export { DecodeStream } from './models/vae-stream.ts'
export type { TransformerInputs, TransformerOptions, VelocityNetwork } from './models/velocity-network.ts'
export { Pipeline, type PipelineConfig, type PipelineOptions, type PipelineSource } from './pipeline.ts'
export { historyTokens, planHistory } from './pyramid/history.ts'
export {
  type NoiseSource,
  type SampleEvent,
  type SampleOptions,
  sampleLatents,
  seededNoise,
} from './sample.ts'
export { Generator } from './tensor/generator.ts'
export { keep, scope } from './tensor/scope.ts'
export { backward, checkpoint, noGrad } from './tensor/tape.ts'
export { type HostArray, Tensor } from './tensor/tensor.ts'
export type { ImmediateTextEncoder, TextEncoder, TextFeatures } from './text/encoder.ts'
export { loadTextEncoder } from './text/load.ts'
export { PromptEncoder, type PromptEncoderOptions } from './text/prompt-encoder.ts'
export { type ForwardOptions, PromptNetworks, type PromptTokens } from './text/prompt-networks.ts'
export { PromptTokenizers } from './text/prompt-tokenizers.ts'
export { WordEncoder, type WordEncoderConfig } from './text/word-encoder.ts'
