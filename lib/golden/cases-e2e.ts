import { denormaliseLatents, type LatentNormalisation, normaliseLatents } from '../flow/normalise.ts'
import { stageSteps } from '../flow/stages.ts'
import { CausalVideoVAE, samplePosterior } from '../models/causal-vae.ts'
import { loadVelocityNetwork } from '../models/load-network.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import { concat, slice } from '../ops/copy.ts'
import { framesDecode, framesEncode } from '../ops/frames.ts'
import { latentPyramid, noisePyramid } from '../pyramid/latents.ts'
import { type Unit, unitsForFrames } from '../pyramid/units.ts'
import { type SampleOptions, sampleLatents } from '../sample.ts'
import { scope } from '../tensor/scope.ts'
import { noGrad } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { TextFeatures } from '../text/encoder.ts'
import { stagesOf } from './cases-numbers.ts'
import { compare, relativeL2, shareBeyond } from './compare.ts'
import { Recorded } from './recorded.ts'
import type { CaseRunner, Check } from './types.ts'

const LATENTS = 1e-5
// Share of frame values that may be more than one level off.
const FRAMES = 1e-3

// Constants that belong to the pipeline, not to the checkpoint (spec/method.md (32)).
const NORMALISATION: Record<string, LatentNormalisation> = {
  pyramid_flux: { image: { shift: -0.04, scale: 1 / 1.8726 }, video: { shift: -0.2343, scale: 1 / 3.0986 } },
  pyramid_mmdit: { image: { shift: 0.149, scale: 1 / 1.8415 }, video: { shift: -0.2343, scale: 1 / 3.0986 } },
}

const expected = (r: Recorded, name: string) => ({ values: r.floats(name), shape: r.shape(name) })

function features(r: Recorded, prefix: string): TextFeatures {
  const embeds = r.tensor(`${prefix}.embeds`)
  const [rows, width] = r.shape(`${prefix}.attention_mask`) as [number, number]
  const flat = r.integers(`${prefix}.attention_mask`)
  const mask = Array.from({ length: rows }, (_, i) => flat.slice(i * width, (i + 1) * width))
  return { embeds, mask, pooled: r.tensor(`${prefix}.pooled`) }
}

/** "models/x (transformer, vae)" as the folders of both. */
function modelFolders(r: Recorded, text: string): { dit: string; vae: string } {
  const match = /^([^(]+)\(([^)]*)\)/.exec(text)
  const base = (match?.[1] ?? text).trim()
  const parts = (match?.[2] ?? 'diffusion_transformer_384p, causal_video_vae')
    .split(',')
    .map((part) => part.trim())
  const of = (word: string): string =>
    r.sibling(`${base}/${parts.find((part) => part.includes(word)) ?? parts[0]}`)
  return { dit: of('transformer'), vae: of('vae') }
}

function encodeImage(r: Recorded, vae: CausalVideoVAE, constants: LatentNormalisation): Tensor {
  const [h, w] = r.shape('input_image') as [number, number]
  return noGrad(() =>
    scope(() => {
      const pixels = framesDecode(Tensor.from(r.bytes('input_image'), [1, 1, h, w, 3]))
      return normaliseLatents(samplePosterior(vae.encode(pixels), r.tensor('posterior_noise')), constants)
    }),
  )
}

/** Autoregressive generation with recorded noise: each stage's latent, the final latents and the decoded frames. */
export const runGeneration: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const c = json.config
  const folders = modelFolders(r, json.model)
  const constants = NORMALISATION[c.kind] as LatentNormalisation
  const model = await loadVelocityNetwork(folders.dit, { dtype: 'f32' })
  const vae = await CausalVideoVAE.fromPretrained(folders.vae, { dtype: 'f32' })
  const firstFrame = c.mode === 'i2v' ? encodeImage(r, vae, constants) : undefined
  const framesPerUnit = c.fpu ?? 1
  // The recorded noise is one draw for all units, which image-to-video counts without the image.
  const units = unitsForFrames(c.temp, { framesPerUnit, mode: c.mode })
  const last = units[units.length - 1] as Unit
  const options: SampleOptions = {
    stages: stagesOf(c, c.steps.length),
    frames: last.firstFrame + last.frames,
    height: c.H,
    width: c.W,
    text: features(r, 'prompt'),
    negative: features(r, 'negative'),
    steps: c.steps,
    // Image-to-video takes one count for every unit.
    videoSteps: firstFrame ? c.steps : (c.vsteps ?? c.steps),
    guidance: {
      guidanceScale: c.g,
      videoGuidanceScale: c.vg,
      ...(c.linear ? { linear: { alpha: c.alpha ?? 0.5, min: c.ming ?? 2 } } : {}),
    },
    noise: {
      initial: ({ index, frames }) =>
        slice(r.tensor('initial_noise'), 2, units[index]?.noiseFrame ?? 0, frames),
      block: ({ index }, stage) => r.tensor(`block_noise.${index}.${stage}`),
    },
    framesPerUnit,
    given: firstFrame,
  }
  const checks = await firstStep(r, model, options)
  const made: Tensor[] = firstFrame ? [firstFrame] : []
  for await (const event of sampleLatents(model, options)) {
    if (event.type === 'unit') made.push(event.latent)
    if (event.type !== 'stage') continue
    const name = `intermed.${event.unit}.${event.stage}`
    checks.push(await compare(name, event.latent, expected(r, name), LATENTS))
  }
  const latents = scope(() => concat(made, 2))
  checks.push(await compare('final latents', latents, expected(r, 'final_latents'), LATENTS))
  if (r.has('frames')) checks.push(await frameCheck(r, vae, latents, constants))
  for (const text of [options.text, options.negative] as TextFeatures[]) {
    text.embeds.dispose()
    text.pooled.dispose()
  }
  for (const t of [...made, latents]) t.dispose()
  vae.dispose()
  model.dispose()
  return checks
}

/** The network's very first answer: rows of the negative prompt, then of the prompt. */
async function firstStep(r: Recorded, model: VelocityNetwork, options: SampleOptions): Promise<Check[]> {
  if (!r.has('first_step.dit_output')) return []
  const { stages, steps, given, framesPerUnit: f = 1, negative } = options
  const text = options.text as TextFeatures
  const tau = stageSteps(stages, 0, steps[0] as number).timesteps[0] as number
  const rows = r.shape('first_step.dit_output')[0] as number
  const v = noGrad(() =>
    scope(() => {
      const guided = rows > text.mask.length && negative !== undefined
      const both = (x: Tensor, y: Tensor): Tensor => (guided ? concat([x, y], 0) : y)
      const noise = noisePyramid(r.tensor('initial_noise'), stages.count)[0] as Tensor
      const x = slice(noise, 2, 0, given ? f : 1)
      const history = given ? [latentPyramid(given, stages.count)[0] as Tensor] : []
      const [out] = model.forward({
        columns: [[...history, x].map((clip) => both(clip, clip))],
        timesteps: new Array<number>(rows).fill(tau),
        text: both(negative?.embeds ?? text.embeds, text.embeds),
        textMask: guided ? [...negative.mask, ...text.mask] : text.mask,
        pooled: both(negative?.pooled ?? text.pooled, text.pooled),
      })
      return out as Tensor
    }),
  )
  const checks = [
    await compare('first network output', v, expected(r, 'first_step.dit_output'), LATENTS),
    {
      name: 'first timestep',
      error: relativeL2(new Array<number>(rows).fill(tau), r.floats('first_step.timestep')),
      tolerance: 1e-6,
    },
  ]
  v.dispose()
  return checks
}

async function frameCheck(
  r: Recorded,
  vae: CausalVideoVAE,
  latents: Tensor,
  constants: LatentNormalisation,
): Promise<Check> {
  const frames = noGrad(() => scope(() => framesEncode(vae.decode(denormaliseLatents(latents, constants)))))
  const error = shareBeyond(await frames.read(), r.bytes('frames'), 1)
  frames.dispose()
  return { name: 'frames (share beyond one level)', error, tolerance: FRAMES }
}
