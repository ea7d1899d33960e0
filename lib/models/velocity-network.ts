import type { ModelConfig } from '../io/pretrained.ts'
import type { LowRank } from '../nn/linear.ts'
import type { Offload } from '../nn/offload.ts'
import type { ComputeType } from '../nn/weights.ts'
import type { Layout } from '../pyramid/layout.ts'
import type { Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { PastKeys } from './past-keys.ts'

/** How to make a network. */
export interface TransformerOptions {
  /** Type of weights and activations; sums and statistics are f32 in both. Default `f32`. */
  dtype?: ComputeType
  /** Parameters want gradients. Default false. */
  train?: boolean
  /** Keep matrices packed for the kernels instead of plain. Default: unless training. */
  pack?: boolean
  /** Round the matrices that every token passes, and what they are multiplied with, to eight bits. Not for training. */
  quantize?: 'int8' | undefined
  /** Let matrices out of memory and back; `absent`: begin without them. Not for training. */
  offload?: 'possible' | 'absent' | undefined
  /** Ends the loading. */
  signal?: AbortSignal | undefined
}

/** What one call of the network gets. R = bs·C rows; row b·C + c belongs to sequence b of column c. */
export interface TransformerInputs {
  /** Columns of clips [bs, 16, t, h, w], oldest first; the last clip of each is the noisy one. */
  columns: readonly (readonly Tensor[])[]
  /** τ in 0 to 1000, [R]. */
  timesteps: ArrayLike<number>
  /** φ(τ) [R, 256] in f32, as `timeFeatures` gives it for the timesteps, where it is in memory already. */
  timeFeatures?: Tensor | undefined
  /** [R, S, joint_attention_dim]. */
  text: Tensor
  /** [R, S], 1 for a token and 0 for padding. */
  textMask?: readonly ArrayLike<number>[] | ArrayLike<number> | undefined
  /** [R, pooled_projection_dim]. */
  pooled: Tensor
  /** Whether frames see no later frames; default from the config. */
  causal?: boolean | undefined
  /** What `layout()` gave for inputs of these sizes, mask and causality; made anew when absent. */
  layout?: Layout | undefined
  /** Where keys and values of text and earlier clips are to be kept; made for `layout`. */
  keep?: PastKeys | undefined
  /**
   * What an earlier call kept for `layout`: text and earlier clips are seen as they were then, and only the last clip of
   * every column is computed.
   */
  past?: PastKeys | undefined
  /** Round τ to bf16 before it is embedded; default in bf16, as the reference's sampler does (its trainer does not). */
  roundTimesteps?: boolean | undefined
  /** Is shown intermediate results while they live. */
  capture?: ((name: string, tensor: Tensor) => void) | undefined
}

/** What a token layout depends on. */
export type LayoutInputs = Pick<TransformerInputs, 'columns' | 'text' | 'textMask' | 'causal'>

/** Fields of config.json that both network families have. */
export interface NetworkConfig {
  num_layers: number
  attention_head_dim: number
  num_attention_heads: number
  joint_attention_dim: number
  pooled_projection_dim: number
  use_temporal_causal: boolean
  use_gradient_checkpointing: boolean
  gradient_checkpointing_ratio: number
}

/** A network that predicts velocities of packed columns of clips: what sampling, training and pipelines need of it. */
export interface VelocityNetwork {
  readonly config: NetworkConfig
  readonly dtype: ComputeType
  /** Channels of the latents it takes and gives. */
  readonly latentChannels: number
  /** What is trained, under the published keys. */
  readonly parameters: ReadonlyMap<string, Tensor>
  /** What is saved with the parameters but never trained. */
  readonly buffers: ReadonlyMap<string, Tensor>
  /** Share of the blocks that are computed again in backward instead of kept (spec/training.md §3), or false. */
  checkpointing: number | false
  /** Lets the matrices out of memory, of a network that was loaded for it. */
  readonly offload: Offload | null
  /** The token layout of inputs of these sizes, to be reused by every step of a stage. */
  layout(inputs: LayoutInputs): Layout
  /** `layout` that pauses now and then, for `sliced`. */
  layoutSteps(inputs: LayoutInputs): Steps<Layout>
  /** φ(τ) as this network takes it, [R, 256]; `round`: τ to bf16 first. */
  timeFeatures(timesteps: ArrayLike<number>, round?: boolean): Float32Array
  /** A network over the same weights, which stay this one's, whose layers add what adapters say (by layer name). */
  adapted(adapters: ReadonlyMap<string, LowRank>): VelocityNetwork
  /** The velocity of each column's last clip, of that clip's shape. @throws ERR_SHAPE or ERR_DTYPE */
  forward(inputs: TransformerInputs): Tensor[]
  /** `forward` that pauses after every block, for `sliced`. */
  forwardSteps(inputs: TransformerInputs): Steps<Tensor[]>
  /** The whole config.json, with the class that it names. */
  modelConfig(): ModelConfig
  /** Writes config.json and the weights as published folders hold them. @throws ERR_IO */
  save(dir: string, options?: { dtype?: ComputeType; signal?: AbortSignal }): Promise<void>
  /** Frees the parameters. */
  dispose(): void
}
