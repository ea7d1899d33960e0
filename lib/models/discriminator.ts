import { PyraflowError } from '../engine/errors.ts'
import { Weights } from '../nn/weights.ts'
import { cast } from '../ops/cast.ts'
import { conv3d } from '../ops/conv3d.ts'
import { concat, permute, reshape } from '../ops/copy.ts'
import { groupNorm } from '../ops/group-norm.ts'
import { axpby, relu } from '../ops/pointwise.ts'
import type { Generator } from '../tensor/generator.ts'
import { atOnce, type Steps } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { framesOf } from './frames.ts'

export interface DiscriminatorConfig {
  /** 2 judges every frame by itself, 3 judges clips. */
  dims: 2 | 3
  input_nc: number
  /** Channels of the first layer; they double with every stride up to eight times. */
  ndf: number
  /** Layers with a norm. */
  n_layers: number
}

/** The published sizes. */
export const DISCRIMINATOR_DEFAULTS: DiscriminatorConfig = { dims: 2, input_nc: 3, ndf: 64, n_layers: 4 }

export interface DiscriminatorOptions {
  dtype?: 'f32' | 'bf16'
  /** Make the parameters leaves that collect gradients. */
  train?: boolean
}

type Triple = readonly [number, number, number]

interface Layer {
  weight: Tensor
  bias: Tensor
  stride: Triple
  normed: boolean
  last: boolean
}

const KERNEL = 4
const SLOPE = 0.2
const NORM_EPS = 1e-5

/**
 * Judges patches of frames or clips (PatchGAN, spec/vae.md §9): convolutions of kernel 4 and padding 1, each but the
 * first and the last followed by instance norm, each but the last by a leaky ReLU.
 */
export class PatchDiscriminator {
  readonly config: DiscriminatorConfig
  readonly dtype: 'f32' | 'bf16'
  readonly parameters: Map<string, Tensor>
  readonly #layers: Layer[] = []

  private constructor(config: DiscriminatorConfig, weights: Weights) {
    this.config = config
    this.dtype = weights.dtype
    const { dims, input_nc, ndf, n_layers } = config
    for (const key of ['input_nc', 'ndf', 'n_layers'] as const) {
      if (Number.isInteger(config[key]) && config[key] > 0) continue
      throw new PyraflowError('ERR_OPTION', {
        what: `discriminator: ${key}`,
        expected: 'a whole number above 0',
        received: String(config[key]),
      })
    }
    let inputs = input_nc
    for (let i = 0; i <= n_layers + 1; i++) {
      const last = i > n_layers
      const outputs = last ? 1 : ndf * Math.min(2 ** i, 8)
      // Published numbering: two modules for the first layer, three for each of the others.
      const w = weights.sub(`main.${i === 0 ? 0 : 3 * i - 1}`)
      const kernel = new Array<number>(dims).fill(KERNEL)
      this.#layers.push({
        weight: w.get('weight', [outputs, inputs, ...kernel], { normal: 0.02 }),
        bias: w.get('bias', [outputs], 'zeros'),
        stride: strideOf(i, config),
        normed: i > 0 && !last,
        last,
      })
      inputs = outputs
    }
    this.parameters = weights.parameters
  }

  /** A new discriminator: weights from N(0, 0.02), biases zero. @throws ERR_OPTION */
  static create(
    config: Partial<DiscriminatorConfig>,
    options: DiscriminatorOptions & { generator: Generator },
  ): PatchDiscriminator {
    const { dtype = 'f32', train = false, generator } = options
    const weights = Weights.init(generator, { dtype, train })
    return new PatchDiscriminator({ ...DISCRIMINATOR_DEFAULTS, ...config }, weights)
  }

  /**
   * Loads a safetensors file with the published names `main.0.weight`, …, also under `loss.discriminator.`.
   * @throws ERR_IO; ERR_CHECKPOINT
   */
  static async fromPretrained(
    path: string,
    config: Partial<DiscriminatorConfig> = {},
    options: DiscriminatorOptions = {},
  ): Promise<PatchDiscriminator> {
    const { dtype = 'f32', train = false } = options
    const how = { dtype, train, stripPrefix: 'loss.discriminator.', ignorePrefixes: [] }
    const full = { ...DISCRIMINATOR_DEFAULTS, ...config }
    return Weights.load(path, how, (weights) => atOnce(() => new PatchDiscriminator(full, weights)))
  }

  /**
   * Logits of the patches of a video [B, C, T, H, W] in [−1, 1]: [B·T, 1, h, w] in two dimensions, [B, 1, t, h, w] in
   * three. `frozen` lets gradients through to the video but keeps them from the parameters.
   * @throws ERR_SHAPE for a video smaller than one patch.
   */
  *forwardSteps(video: Tensor, options: { frozen?: boolean } = {}): Steps<Tensor> {
    this.checkShape(video.shape)
    const { dims } = this.config
    const part = (t: Tensor, shape: readonly number[]): Tensor =>
      options.frozen ? t.view(shape) : reshape(t, shape)
    let x = cast(dims === 2 ? framesOf(video) : permute(video, [0, 2, 3, 4, 1]), this.dtype)
    for (const { weight, bias, stride, normed, last } of this.#layers) {
      const [outputs, inputs, ...kernel] = weight.shape as number[]
      const shape = [outputs, inputs, ...(dims === 2 ? [1] : []), ...kernel] as number[]
      const pad: Triple = [dims - 2, 1, 1]
      const padded = dims === 3 ? zeroFrameBehind(x) : x
      x = conv3d(padded, part(weight, shape), part(bias, bias.shape), { stride, pad })
      if (normed) x = instanceNorm(x)
      if (!last) x = leakyRelu(x)
      yield
    }
    const logits = permute(x, [0, 4, 1, 2, 3])
    if (dims === 3) return logits
    const [f, , , h, w] = logits.shape as [number, number, number, number, number]
    return reshape(logits, [f, 1, h, w])
  }

  /** @throws ERR_SHAPE unless videos of this shape [B, C, T, H, W] have room for a patch. */
  checkShape(shape: readonly number[]): void {
    const { dims, input_nc: channels } = this.config
    const room = (size: number, axis: number): number =>
      this.#layers.reduce(
        (n, { stride }) => Math.floor((n + 2 - KERNEL) / (stride[axis] as number)) + 1,
        size,
      )
    const fits = shape.slice(2).every((size, axis) => (axis === 0 && dims === 2) || room(size, axis) >= 1)
    if (shape.length === 5 && shape[1] === channels && fits) return
    throw new PyraflowError('ERR_SHAPE', {
      what: `${dims}-D discriminator of ${this.#layers.length} layers`,
      expected: `a video [B, ${channels}, T, H, W] with room for a patch`,
      received: `[${shape.join(', ')}]`,
      remedy: 'Use larger crops or a discriminator of fewer layers.',
    })
  }

  dispose(): void {
    for (const p of this.parameters.values()) p.dispose()
  }
}

// The last normed layer and the logits keep the resolution; of the others only the first one halves time.
function strideOf(i: number, { dims, n_layers }: DiscriminatorConfig): Triple {
  if (i >= n_layers) return [1, 1, 1]
  return [dims === 3 && i === 0 ? 2 : 1, 2, 2]
}

// conv3d is causal: it pads time in front only.
function zeroFrameBehind(x: Tensor): Tensor {
  const frame = x.shape.map((n, axis) => (axis === 1 ? 1 : n))
  return concat([x, Tensor.zeros(frame, x.dtype)], 1)
}

function leakyRelu(x: Tensor): Tensor {
  return axpby(relu(x), x, 1 - SLOPE, SLOPE)
}

/** Zero mean and unit variance of every channel of every sample. */
function instanceNorm(x: Tensor): Tensor {
  const [n, t, h, w, c] = x.shape as [number, number, number, number, number]
  const [ones, zeros] = [Tensor.full([c], 1), Tensor.zeros([c])]
  const flat = reshape(x, [n, t * h * w, c])
  return reshape(groupNorm(flat, ones, zeros, { groups: c, eps: NORM_EPS }), x.shape)
}
