import { PyraflowError } from '../engine/errors.ts'
import { klLoss, type Posterior } from '../models/causal-vae.ts'
import type { PatchDiscriminator } from '../models/discriminator.ts'
import { framesOf } from '../models/frames.ts'
import { Lpips } from '../models/lpips.ts'
import { cast } from '../ops/cast.ts'
import { mse } from '../ops/mse.ts'
import { add, axpby, clamp, div, exp, mul, relu, scale, sqrt, square } from '../ops/pointwise.ts'
import { mean, sum } from '../ops/reduce.ts'
import { differentiate, noGrad, record, type Steps } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import type { StepLoss } from './run.ts'

export interface VaeLossOptions {
  /** λ_px, 1: weight of the mean squared error. */
  pixelWeight?: number | undefined
  /** λ_kl, 1e-6. */
  klWeight?: number | undefined
  /** lv of (11), a constant 0: the reference declares it trainable but trains it nowhere. */
  logvar?: number | undefined
  /** Without it the perceptual term is off. */
  perceptual?: { model: Lpips /** λ_lp, 1. */; weight?: number | undefined } | undefined
  /** Without it the adversarial term is off. */
  adversarial?: AdversarialOptions | undefined
}

export interface AdversarialOptions {
  discriminator: PatchDiscriminator
  /** λ_disc, 0.5. */
  weight?: number | undefined
  /** First step with the adversarial term, 0; the discriminator begins to learn then, too. */
  start?: number | undefined
  /** What the discriminator minimises. */
  kind?: 'hinge' | 'vanilla' | undefined
}

/**
 * The decoder's last layer as a function of its weight: (13) weighs the terms by their gradients with respect to it.
 */
export interface LastLayer {
  weight: Tensor
  /** The decoded video again, up to a constant, from `weight`; everything else in it must be a constant of the tape. */
  run(weight: Tensor): Tensor
}

export interface Reconstruction {
  /** The true clip, [B, C, T, H, W] in [−1, 1]. */
  target: Tensor
  /** What the decoder made of a sample of `posterior`; same shape. */
  decoded: Tensor
  posterior: Posterior
  /** Wanted by the adversarial term only. */
  lastLayer?: LastLayer | undefined
}

// (13)
const NORM_EPS = 1e-4
const MOST_WEIGHT = 1e4

/** The losses a VAE is trained with (spec/vae.md §9): pixels, perception, KL and a discriminator. */
export class VaeLoss {
  readonly options: Readonly<VaeLossOptions>

  /** @throws ERR_OPTION for a weight that is negative or not a number. */
  constructor(options: VaeLossOptions) {
    const { pixelWeight, klWeight, perceptual, adversarial } = options
    const weights = {
      pixelWeight,
      klWeight,
      'perceptual.weight': perceptual?.weight,
      'adversarial.weight': adversarial?.weight,
      'adversarial.start': adversarial?.start,
    }
    for (const [what, value] of Object.entries(weights)) {
      if (value === undefined || (value >= 0 && Number.isFinite(value))) continue
      throw new PyraflowError('ERR_OPTION', { what, expected: 'a number from 0 on', received: String(value) })
    }
    this.options = options
  }

  /** @throws ERR_SHAPE when a term cannot judge videos of this shape [B, C, T, H, W]. */
  checkShape(shape: readonly number[]): void {
    const { perceptual, adversarial } = this.options
    if (perceptual) Lpips.checkSize(shape[3] as number, shape[4] as number)
    adversarial?.discriminator.checkShape(shape)
  }

  /** Whether the adversarial term is on at this step. */
  adversarialAt(step: number): boolean {
    const { adversarial } = this.options
    return adversarial !== undefined && step >= (adversarial.start ?? 0)
  }

  /**
   * L_vae (12) and its terms. Its gradient with respect to the decoded video is computed here, because the adaptive
   * weight needs it; `backward` of the loss hands it on to the decoder and encoder.
   */
  *vaeSteps(step: number, made: Reconstruction): Steps<StepLoss> {
    const { klWeight = 1e-6 } = this.options
    const { decoded } = made
    const {
      outputs: { loss: nll, ...terms },
      gradients,
    } = yield* differentiate((video) => this.#nllSteps(video, made.target), [decoded])
    const kl = klLoss(made.posterior)
    yield
    let loss = noGrad(() => axpby(nll, kl, 1, klWeight))
    let gradient = gradients[0] as Tensor
    const metrics: Record<string, Tensor> = { ...terms, kl }
    if (this.adversarialAt(step)) {
      const judged = yield* this.#adversarialSteps(made, gradient)
      loss = noGrad(() => add(loss, mul(judged.loss, judged.weight)))
      gradient = noGrad(() => add(gradient, mul(judged.gradient, judged.weight)))
      metrics.generator = judged.loss
      metrics.adaptiveWeight = judged.weight
    }
    record([decoded, kl], [loss], ([g]) => [mul(gradient, g as Tensor), scale(g as Tensor, klWeight)])
    return { loss, metrics }
  }

  /** The terms of (12) that judge a reconstruction by itself, and their sum; a discriminator's verdict is none of them. */
  *validationSteps({ decoded, target, posterior }: Reconstruction): Steps<StepLoss> {
    const { loss: nll, ...terms } = yield* this.#nllSteps(decoded, target)
    const kl = klLoss(posterior)
    return { loss: axpby(nll, kl, 1, this.options.klWeight ?? 1e-6), metrics: { ...terms, kl } }
  }

  // (11), with the mean over frames taken term by term.
  *#nllSteps(
    decoded: Tensor,
    target: Tensor,
  ): Steps<{ loss: Tensor; reconstruction: Tensor; perception?: Tensor }> {
    const { pixelWeight = 1, logvar = 0, perceptual } = this.options
    const reconstruction = mean(mse(decoded, cast(target, decoded.dtype)))
    const certainty = Math.exp(-logvar)
    const pixels = scale(reconstruction, pixelWeight * certainty, logvar)
    if (!perceptual) return { loss: pixels, reconstruction }
    const distances = yield* perceptual.model.distanceSteps(framesOf(target), framesOf(decoded))
    const perception = mean(distances)
    const loss = axpby(pixels, perception, 1, (perceptual.weight ?? 1) * certainty)
    return { loss, reconstruction, perception }
  }

  // L_g of (12), its gradient by the decoded video, and its weight (13).
  *#adversarialSteps(
    { decoded, lastLayer }: Reconstruction,
    ofNll: Tensor,
  ): Steps<{ loss: Tensor; gradient: Tensor; weight: Tensor }> {
    const { discriminator, weight = 0.5 } = this.options.adversarial as AdversarialOptions
    const { outputs, gradients } = yield* differentiate(
      function* (video) {
        const logits = yield* discriminator.forwardSteps(video, { frozen: true })
        return { loss: scale(mean(cast(logits, 'f32')), -1) }
      },
      [decoded],
    )
    const gradient = gradients[0] as Tensor
    if (!lastLayer) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'the adversarial term',
        expected: 'the last layer of the decoder, to weigh it by',
        received: 'none',
      })
    }
    const norms: Tensor[] = []
    for (const g of [ofNll, gradient]) norms.push(yield* gradientNorm(lastLayer, g))
    const adaptive = noGrad(() => {
      const [nll, adversarial] = norms as [Tensor, Tensor]
      return scale(clamp(div(nll, scale(adversarial, 1, NORM_EPS)), 0, MOST_WEIGHT), weight)
    })
    return { loss: outputs.loss, gradient, weight: adaptive }
  }

  /**
   * L_disc (14) on constants: its gradients times `share` are added to those of the discriminator's parameters, nothing
   * else is touched.
   */
  *discriminatorSteps({ target, decoded }: Reconstruction, share = 1): Steps<StepLoss> {
    const { discriminator, kind = 'hinge' } = this.options.adversarial as AdversarialOptions
    const judge = function* (video: Tensor): Steps<Tensor> {
      return cast(yield* discriminator.forwardSteps(video), 'f32')
    }
    // Real must rise above 1 and false sink below −1, or each to its side of 0.
    const wrong = kind === 'hinge' ? (x: Tensor) => relu(scale(x, 1, 1)) : softplus
    const { outputs } = yield* differentiate(function* () {
      const real = yield* judge(target)
      const fake = yield* judge(decoded)
      const whole = axpby(mean(wrong(scale(real, -1))), mean(wrong(fake)), 0.5, 0.5)
      const loss = share === 1 ? whole : scale(whole, share)
      return { loss, whole, discriminatorReal: mean(real), discriminatorFake: mean(fake) }
    }, [])
    const { whole, discriminatorReal, discriminatorFake } = outputs
    return { loss: whole, metrics: { discriminatorReal, discriminatorFake } }
  }
}

/** Length of the gradient by the last layer's weight when that by the decoded video is `g`. */
function* gradientNorm({ weight, run }: LastLayer, g: Tensor): Steps<Tensor> {
  const { gradients } = yield* differentiate(
    // biome-ignore lint/correctness/useYield: one layer needs no pause
    function* (w) {
      return { loss: sum(mul(run(w), g)) }
    },
    [weight],
  )
  return noGrad(() => sqrt(sum(square(cast(gradients[0] as Tensor, 'f32')))))
}

// log(1 + u) = 2·artanh(z) with z = u/(2 + u) ≤ 1/3 for u in (0, 1]: seven terms leave 1e-8.
const ARTANH = [1, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13] as const

/** log(1 + eˣ) = max(x, 0) + log(1 + e^−|x|). */
export function softplus(x: Tensor): Tensor {
  const positive = relu(x)
  const size = axpby(positive, x, 2, -1)
  const u = exp(scale(size, -1))
  const z = div(u, scale(u, 1, 2))
  const zz = square(z)
  const [top, ...rest] = ARTANH.toReversed() as [number, ...number[]]
  let series = scale(zz, top, rest[0])
  for (const c of rest.slice(1)) series = scale(mul(series, zz), 1, c)
  return axpby(positive, mul(series, z), 1, 2)
}
