import type { Posterior } from '../models/causal-vae.ts'
import { type DiscriminatorConfig, PatchDiscriminator } from '../models/discriminator.ts'
import { framesOf } from '../models/frames.ts'
import { Lpips } from '../models/lpips.ts'
import { conv3d } from '../ops/conv3d.ts'
import { permute, reshape, slice } from '../ops/copy.ts'
import { clamp, square } from '../ops/pointwise.ts'
import { mean, sum } from '../ops/reduce.ts'
import { Generator } from '../tensor/generator.ts'
import { scope } from '../tensor/scope.ts'
import { backward, clearTape, drain, noGrad } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { type Reconstruction, VaeLoss } from '../train/vae-loss.ts'
import { compare, compareGradients, scalar } from './compare.ts'
import { fillHashed, prefixesOf, recipeOf } from './hashed-weights.ts'
import { Recorded } from './recorded.ts'
import type { CaseRunner, Check } from './types.ts'

const VALUES = 1e-4
const GRADIENTS = 1e-3
const ADAPTIVE = 1e-3

const expected = (r: Recorded, name: string) => ({ values: r.floats(name), shape: r.shape(name) })

function leaf(t: Tensor): Tensor {
  t.requiresGrad = true
  return t
}

/** A batch of images [B, C, H, W] as a video [B, C, 1, H, W]; videos stay. */
function asVideo(t: Tensor): Tensor {
  const [b, c, ...sizes] = t.shape as [number, number, ...number[]]
  return sizes.length === 3 ? t : reshape(t, [b, c, 1, ...sizes])
}

async function hashedLpips(lines: readonly string[]): Promise<Lpips> {
  const lpips = Lpips.create(new Generator(0))
  await fillHashed(lpips.parameters, prefixesOf(lines).lpips, recipeOf(lines))
  return lpips
}

/** The perceptual distance, the features that are recorded of its input, and its gradient. */
export const runLpips: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const lpips = await hashedLpips(json.weights)
  const [input, target] = [r.tensor('input'), leaf(r.tensor('target'))]
  const checks: Check[] = []
  const { value, features } = scope(() => {
    const distances = drain(lpips.distanceSteps(framesOf(asVideo(input)), framesOf(asVideo(target))))
    backward(sum(distances))
    const means = noGrad(() =>
      drain(lpips.featureSteps(framesOf(asVideo(input)))).map((level) => {
        const [f, , h, w, c] = level.shape as [number, number, number, number, number]
        return mean(reshape(level, [f, h * w, c]), 1)
      }),
    )
    return { value: reshape(distances, r.shape('value')), features: means }
  })
  clearTape()
  checks.push(await compare('value', value, expected(r, 'value'), VALUES))
  for (const [i, level] of features.entries()) {
    const name = `feature_mean.${i}`
    if (!r.has(name)) continue
    const kept = scope(() => slice(level, 1, 0, r.shape(name)[1] as number))
    checks.push(await compare(name, kept, expected(r, name), VALUES))
    kept.dispose()
  }
  checks.push(await compare('target_grad', target.grad as Tensor, expected(r, 'target_grad'), GRADIENTS))
  for (const t of [value, ...features, input, target.grad, target, lpips]) t?.dispose()
  return checks
}

/** A discriminator of the recorded weights, images or clips: logits, and the gradients of their mean square. */
export const runDiscriminator: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const dims = r.shape('x').length === 5 ? 3 : 2
  const { input_nc, ndf, n_layers } = json.config as Omit<DiscriminatorConfig, 'dims'>
  const discriminator = PatchDiscriminator.create(
    { dims, input_nc, ndf, n_layers },
    { generator: new Generator(0), train: true },
  )
  for (const [name, p] of discriminator.parameters) p.write(r.floats(`weight.${name}`))
  const x = leaf(r.tensor('x'))
  const logits = scope(() => {
    const y = drain(discriminator.forwardSteps(asVideo(x)))
    backward(mean(square(y)))
    return y
  })
  clearTape()
  const record = {
    rows: json.gradient_table.rows,
    values: (name: string) => (r.has(`grad.${name}`) ? r.floats(`grad.${name}`) : undefined),
  }
  const checks: Check[] = [
    await compare('logits', logits, expected(r, 'logits'), VALUES),
    await compare('input_grad.x', x.grad as Tensor, expected(r, 'input_grad.x'), GRADIENTS),
    ...(await compareGradients((name) => discriminator.parameters.get(name)?.grad, record, GRADIENTS)),
  ]
  for (const t of [logits, x.grad, x]) t?.dispose()
  for (const p of discriminator.parameters.values()) p.grad?.dispose()
  discriminator.dispose()
  return checks
}

/** All terms of the VAE's loss and of the discriminator's, at every recorded step. */
export const runVaeLoss: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const c = json.config
  const lpips = await hashedLpips(json.weights)
  const discriminator = PatchDiscriminator.create(
    { ndf: c.ndf, n_layers: c.disc_num_layers },
    { generator: new Generator(0), train: true },
  )
  await fillHashed(discriminator.parameters, prefixesOf(json.weights).discriminator, recipeOf(json.weights))
  const checks: Check[] = []
  for (const log of json.logs) {
    const loss = new VaeLoss({
      pixelWeight: c.pixelloss_weight,
      klWeight: c.kl_weight,
      logvar: log.generator['train/logvar'],
      perceptual: { model: lpips, weight: c.perceptual_weight },
      adversarial: { discriminator, weight: c.disc_weight, start: c.disc_start, kind: c.disc_loss },
    })
    checks.push(...(await runLossStep(r, log, loss)))
    for (const p of discriminator.parameters.values()) {
      p.grad?.dispose()
      p.grad = null
    }
  }
  discriminator.dispose()
  lpips.dispose()
  return checks
}

// biome-ignore lint/suspicious/noExplicitAny: one recorded log
async function runLossStep(r: Recorded, log: any, loss: VaeLoss): Promise<Check[]> {
  const inputs = {
    features: leaf(r.tensor('features')),
    last_layer: leaf(r.tensor('last_layer')),
    moments: leaf(r.tensor('moments')),
  }
  const { made, generator, critic } = scope(() => {
    const video = recordedVideo(r, inputs)
    const vae = drain(loss.vaeSteps(log.step, video))
    backward(vae.loss)
    const judged = loss.adversarialAt(log.step) ? drain(loss.discriminatorSteps(video)) : undefined
    return { made: video.decoded, generator: vae, critic: judged }
  })
  clearTape()
  const named = (name: string): string => `step ${log.step}: ${name}`
  const g = log.generator
  const nll = g['train/nll_loss'] - g['train/logvar']
  const pairs: [string, Tensor | undefined, number, number][] = [
    ['total_loss', generator.loss, g['train/total_loss'], VALUES],
    ['rec_loss', generator.metrics?.reconstruction, g['train/rec_loss'], VALUES],
    ['perception_loss', generator.metrics?.perception, g['train/perception_loss'], VALUES],
    ['kl_loss', generator.metrics?.kl, g['train/kl_loss'], VALUES],
    ['g_loss', generator.metrics?.generator, g['train/g_loss'], VALUES],
    ['d_weight', generator.metrics?.adaptiveWeight, g['train/d_weight'], ADAPTIVE],
    ['disc_loss', critic?.loss, log.discriminator['train/disc_loss'], VALUES],
    ['logits_real', critic?.metrics?.discriminatorReal, log.discriminator['train/logits_real'], VALUES],
    ['logits_fake', critic?.metrics?.discriminatorFake, log.discriminator['train/logits_fake'], VALUES],
  ]
  const checks: Check[] = [
    await compare(named('reconstruction'), made, expected(r, 'reconstruction'), VALUES),
    scalar(named('disc_factor'), critic ? 1 : 0, g['train/disc_factor'], 0),
    // ∂/∂lv of (11).
    scalar(named('grad_logvar'), 1 - nll, log.grad_logvar, VALUES),
  ]
  for (const [name, value, number, tolerance] of pairs) {
    // Before its start the adversarial term is not computed; the total shows that nothing of it is in there.
    if (value) checks.push(scalar(named(name), await value.item(), number, tolerance))
    value?.dispose()
  }
  for (const [name, t] of Object.entries(inputs)) {
    const key = `step${log.step}.grad.${name}`
    if (r.has(key)) checks.push(await compare(key, t.grad as Tensor, expected(r, key), GRADIENTS))
  }
  if (critic) {
    const { discriminator } = loss.options.adversarial ?? {}
    const record = { rows: log.discriminator_gradient_norms, values: () => undefined }
    const gradients = (name: string) => discriminator?.parameters.get(name)?.grad
    checks.push(...(await compareGradients(gradients, record, GRADIENTS)))
  }
  for (const t of [made, ...Object.values(inputs)]) {
    t.grad?.dispose()
    t.dispose()
  }
  return checks
}

/** The recorded stand-in for an autoencoder: moments as they are, frames by a 1×1×1 convolution of features. */
function recordedVideo(
  r: Recorded,
  { features, last_layer, moments }: Record<'features' | 'last_layer' | 'moments', Tensor>,
): Reconstruction {
  const z = (moments.shape[1] as number) / 2
  const posterior: Posterior = {
    mean: slice(moments, 1, 0, z),
    logvar: clamp(slice(moments, 1, z, z), -30, 20),
  }
  const decode = (x: Tensor, weight: Tensor): Tensor =>
    permute(conv3d(permute(x, [0, 2, 3, 4, 1]), weight), [0, 4, 1, 2, 3])
  const constant = features.view(features.shape)
  const lastLayer = { weight: last_layer, run: (weight: Tensor) => decode(constant, weight) }
  const decoded = decode(features, last_layer)
  return { target: r.tensor('inputs'), decoded, posterior, lastLayer }
}
