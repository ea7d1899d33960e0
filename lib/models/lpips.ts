import { PyraflowError } from '../engine/errors.ts'
import { Weights } from '../nn/weights.ts'
import { cast } from '../ops/cast.ts'
import { conv3d } from '../ops/conv3d.ts'
import { reshape, slice } from '../ops/copy.ts'
import { add, div, mul, relu, scale, sqrt, square, sub } from '../ops/pointwise.ts'
import { mean, sum } from '../ops/reduce.ts'
import type { Generator } from '../tensor/generator.ts'
import { keep, scope } from '../tensor/scope.ts'
import { atOnce, noGrad, type Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'

// VGG16 up to relu5_3: the numbers of the published convolutions, and the channels of each group of them.
const GROUPS: readonly { layers: readonly number[]; channels: number }[] = [
  { layers: [0, 2], channels: 64 },
  { layers: [5, 7], channels: 128 },
  { layers: [10, 12, 14], channels: 256 },
  { layers: [17, 19, 21], channels: 512 },
  { layers: [24, 26, 28], channels: 512 },
]
const SHIFT = Float32Array.of(-0.03, -0.088, -0.188)
const SCALE = Float32Array.of(0.458, 0.448, 0.45)
const EPS = 1e-10

interface Group {
  convs: { weight: Tensor; bias: Tensor }[]
  /** Non-negative weight of every channel, [C]. */
  linear: Tensor
}

export interface LpipsOptions {
  /** Type of the convolutions; distances are always f32. */
  dtype?: 'f32' | 'bf16'
}

/**
 * Perceptual distance of frames (LPIPS, spec/vae.md §9): squared differences of the unit-length features of VGG16 at
 * five depths, weighed by learnt factors. Its own weights are never trained.
 */
export class Lpips {
  readonly dtype: 'f32' | 'bf16'
  readonly parameters: ReadonlyMap<string, Tensor>
  readonly #weights: Weights
  readonly #views: Tensor[] = []
  readonly #groups: Group[] = []
  readonly #shift: Tensor
  readonly #scale: Tensor

  private constructor(weights: Weights) {
    this.#weights = weights
    this.dtype = weights.dtype
    const row = (name: string, values: Float32Array): Tensor => {
      const buffer = weights.get(`scaling_layer.${name}`, [1, 3, 1, 1], 'zeros', {
        buffer: true,
        values: () => values,
      })
      return this.#view(buffer, [3])
    }
    this.#shift = row('shift', SHIFT)
    this.#scale = row('scale', SCALE)
    let inputs = 3
    GROUPS.forEach(({ layers, channels }, i) => {
      const convs = layers.map((layer) => {
        const w = weights.sub(`net.slice${i + 1}.${layer}`)
        const weight = this.#view(w.get('weight', [channels, inputs, 3, 3]), [channels, inputs, 1, 3, 3])
        inputs = channels
        return { weight, bias: w.get('bias', [channels]) }
      })
      const linear = weights.get(`lin${i}.model.1.weight`, [1, channels, 1, 1], 'ones', { dtype: 'f32' })
      this.#groups.push({ convs, linear: this.#view(linear, [channels]) })
    })
    this.parameters = weights.parameters
  }

  /**
   * Loads a safetensors file (or a folder with one) under the published names: `net.slice1.0.weight`, …,
   * `lin4.model.1.weight`.
   * @throws ERR_IO; ERR_CHECKPOINT naming the missing, extra or mis-shaped key.
   */
  static async fromPretrained(path: string, options: LpipsOptions = {}): Promise<Lpips> {
    // Newer releases list the linear layers a second time.
    const how = { dtype: options.dtype ?? 'f32', pack: false, ignorePrefixes: ['lins.'] }
    return Weights.load(path, how, (weights) => atOnce(() => new Lpips(weights)))
  }

  /** @throws ERR_SHAPE for frames too small to be halved four times. */
  static checkSize(height: number, width: number): void {
    const least = 2 ** (GROUPS.length - 1)
    if (Math.min(height, width) >= least) return
    throw new PyraflowError('ERR_SHAPE', {
      what: 'Lpips',
      expected: `frames of at least ${least}×${least} pixels`,
      received: `${height}×${width}`,
      remedy: 'Use larger crops.',
    })
  }

  /** Random features: of no use as a measure, but of the same shape, for tests and plans. */
  static create(generator: Generator, options: LpipsOptions = {}): Lpips {
    return new Lpips(Weights.init(generator, { dtype: options.dtype ?? 'f32', pack: false }))
  }

  #view(t: Tensor, shape: readonly number[]): Tensor {
    const view = keep(t.view(shape))
    this.#views.push(view)
    return view
  }

  /**
   * Features at relu1_2 … relu5_3, [F, 1, h, w, C] each, of frames [F, 1, H, W, 3] in [−1, 1] with H, W ≥ 16.
   * @throws ERR_SHAPE
   */
  *featureSteps(frames: Tensor): Steps<Tensor[]> {
    const [, depth, h, w, c] = frames.shape as [number, number, number, number, number]
    if (frames.rank !== 5 || depth !== 1 || c !== 3) {
      throw new PyraflowError('ERR_SHAPE', {
        what: 'Lpips',
        expected: 'frames [F, 1, H, W, 3]',
        received: `[${frames.shape.join(', ')}]`,
      })
    }
    Lpips.checkSize(h, w)
    let x = cast(div(sub(cast(frames, 'f32'), this.#shift), this.#scale), this.dtype)
    const features: Tensor[] = []
    for (const { convs } of this.#groups) {
      if (features.length > 0) x = halved(x)
      for (const { weight, bias } of convs) x = relu(conv3d(x, weight, bias, { pad: [0, 1, 1] }))
      features.push(x)
      yield
    }
    return features
  }

  /**
   * Distance of each frame of `y` from the same frame of `x`, f32 [F]; only `y` gets a gradient. Both are
   * [F, 1, H, W, 3] in [−1, 1].
   * @throws ERR_SHAPE
   */
  *distanceSteps(x: Tensor, y: Tensor): Steps<Tensor> {
    const fixed = yield* withoutGradients(this.featureSteps(x))
    const moving = yield* this.featureSteps(y)
    let total: Tensor | null = null
    for (const [i, { linear }] of this.#groups.entries()) {
      const target = noGrad(() => scope(() => unitLength(fixed[i] as Tensor)))
      const difference = square(sub(unitLength(moving[i] as Tensor), target))
      const [f, , h, w, c] = difference.shape as [number, number, number, number, number]
      const perChannel = mean(reshape(difference, [f, h * w, c]), 1) // [F, C]
      const distance = sum(mul(perChannel, linear), 1) // [F]
      total = total ? add(total, distance) : distance
      yield
    }
    return total as Tensor
  }

  dispose(): void {
    for (const view of this.#views) view.dispose()
    this.#weights.dispose()
  }
}

function* withoutGradients<T>(steps: Steps<T>): Steps<T> {
  for (;;) {
    const { value, done } = noGrad(() => steps.next())
    if (done) return value
    yield
  }
}

/** 2×2 maxima of [F, 1, h, w, C]; an odd last row or column is left out. */
function halved(x: Tensor): Tensor {
  const [f, , h, w, c] = x.shape as [number, number, number, number, number]
  const [H, W] = [h >> 1, w >> 1]
  const even = h % 2 || w % 2 ? slice(slice(x, 2, 0, 2 * H), 3, 0, 2 * W) : x
  const cells = reshape(even, [f, H, 2, W, 2, c])
  const rows = maximum(slice(cells, 2, 0, 1), slice(cells, 2, 1, 1)) // [F, H, 1, W, 2, C]
  return reshape(maximum(slice(rows, 4, 0, 1), slice(rows, 4, 1, 1)), [f, 1, H, W, c])
}

// Of equal values the first one gets the gradient.
function maximum(a: Tensor, b: Tensor): Tensor {
  return add(a, relu(sub(b, a)))
}

/** Features divided by their length over the channels, in f32. */
function unitLength(features: Tensor): Tensor {
  const wide = cast(features, 'f32')
  const squares = sum(square(wide), 4) // [F, 1, h, w]
  // A pixel without any feature must not divide by zero in the gradient of the root.
  const length = sqrt(scale(squares, 1, EPS * EPS))
  return div(wide, scale(reshape(length, [...length.shape, 1]), 1, EPS))
}
