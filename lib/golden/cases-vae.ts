import { CausalVideoVAE, klLoss, type Posterior, samplePosterior } from '../models/causal-vae.ts'
import { concat, permute, reshape, slice } from '../ops/copy.ts'
import { mse } from '../ops/mse.ts'
import { axpby } from '../ops/pointwise.ts'
import { mean } from '../ops/reduce.ts'
import { keep, scope } from '../tensor/scope.ts'
import { backward, clearTape, noGrad } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { compare, compareGradients, scalar } from './compare.ts'
import { Recorded } from './recorded.ts'
import type { CaseContext, CaseRunner, Check } from './types.ts'

const TOLERANCE = { f32: 1e-5, bf16: 5e-2 } as const
const GRADIENTS = 1e-4

const expected = (r: Recorded, name: string) => ({ values: r.floats(name), shape: r.shape(name) })

// The model keeps channels last; records are [B, C, T, H, W], and [B·T, C, H, W] inside the frame attention.
function asRecorded(x: Tensor, rank: number): Tensor {
  if (rank === 5) return permute(x, [0, 4, 1, 2, 3])
  const frames = permute(x, [0, 1, 4, 2, 3])
  return reshape(frames, [(x.shape[0] as number) * (x.shape[1] as number), ...frames.shape.slice(2)])
}

/** Runs `network` with the activations recorded under `prefix.act.` caught on the way. */
function caught<T>(
  r: Recorded,
  prefix: string,
  wanted: boolean,
  network: (capture: (name: string, x: Tensor) => void) => T,
): { result: T; activations: Map<string, Tensor> } {
  return noGrad(() =>
    scope(() => {
      const activations = new Map<string, Tensor>()
      const result = network((name, x) => {
        const full = `${prefix}.act.${name}`
        if (wanted && r.has(full)) activations.set(full, keep(asRecorded(x, r.shape(full).length)))
      })
      return { result, activations }
    }),
  )
}

async function compareAll(
  r: Recorded,
  found: Map<string, Tensor>,
  prefix: string,
  tolerance: number,
): Promise<Check[]> {
  const checks: Check[] = []
  for (const name of r.names.filter((n) => n.startsWith(`${prefix}.act.`))) {
    const activation = found.get(name)
    if (activation) checks.push(await compare(name, activation, expected(r, name), tolerance))
    else checks.push({ name: `${name} was not computed`, error: Number.POSITIVE_INFINITY, tolerance })
  }
  for (const t of found.values()) t.dispose()
  return checks
}

const inputs = (r: Recorded, suffix: string) =>
  r.names.filter((name) => name.endsWith(`.${suffix}`)).map((name) => name.slice(0, -suffix.length - 1))

function load(r: Recorded, model: string, ctx: CaseContext, train = false): Promise<CausalVideoVAE> {
  return CausalVideoVAE.fromPretrained(r.sibling(model), { dtype: ctx.dtype, train })
}

/** Posterior and activations of images and clips, of the whole clip and in the recorded chunks. */
export const runVaeEncode: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const vae = await load(r, json.model, ctx)
  const checks: Check[] = []
  for (const prefix of inputs(r, 'x')) {
    const x = r.tensor(`${prefix}.x`, ctx.dtype)
    // Intermediate results have no recorded bf16 tolerance.
    const { result, activations } = caught(r, prefix, ctx.dtype === 'f32', (capture) =>
      vae.encode(x, { capture }),
    )
    for (const name of r.names) {
      const [, chunk, part] = new RegExp(`^${prefix}\\.(?:chunk(\\d+)\\.)?(mean|logvar)$`).exec(name) ?? []
      if (!part) continue
      const window = chunk === undefined ? undefined : Number(chunk) / vae.temporalFactor
      const found = window ? noGrad(() => vae.encode(x, { window })) : result
      const values = found[part as keyof Posterior]
      checks.push(await compare(name, values, expected(r, name), TOLERANCE[ctx.dtype]))
      if (window) for (const t of [found.mean, found.logvar]) t.dispose()
    }
    if (ctx.dtype === 'f32') checks.push(...(await compareAll(r, activations, prefix, TOLERANCE.f32)))
    for (const t of [x, result.mean, result.logvar]) t.dispose()
  }
  vae.dispose()
  return checks
}

/** Frames and activations of images and clips, in bf16 also against the recorded bf16 run. */
export const runVaeDecode: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const vae = await load(r, json.model, ctx)
  const checks: Check[] = []
  const tolerance = TOLERANCE[ctx.dtype]
  const half = r.file('bf16.safetensors')
  for (const prefix of inputs(r, 'z')) {
    const z = r.tensor(`${prefix}.z`, ctx.dtype)
    const { result, activations } = caught(r, prefix, ctx.dtype === 'f32', (capture) =>
      vae.decode(z, { capture }),
    )
    const name = `${prefix}.sample`
    checks.push(await compare(name, result, expected(r, name), tolerance))
    for (const window of [1, 2]) {
      const chunked = noGrad(() => vae.decode(z, { window }))
      checks.push(await compare(`${name}, window ${window}`, chunked, expected(r, name), tolerance))
      chunked.dispose()
    }
    if (ctx.dtype === 'bf16' && half?.entries.has(name)) {
      const values = { values: half.readFloats(name), shape: half.entries.get(name)?.shape ?? [] }
      checks.push(await compare(`${name} against the bf16 record`, result, values, tolerance))
    }
    if (ctx.dtype === 'f32') checks.push(...(await compareAll(r, activations, prefix, tolerance)))
    for (const t of [z, result]) t.dispose()
  }
  // A chunk of one latent frame that begins the video is that frame decoded alone.
  for (const name of r.names.filter((n) => /^first_frame\..*sample$/.test(n))) {
    const first = noGrad(() => scope(() => vae.decode(slice(r.tensor('video.z', ctx.dtype), 2, 0, 1))))
    checks.push(await compare(name, first, expected(r, name), tolerance))
    first.dispose()
  }
  vae.dispose()
  return checks
}

/** Tiles of the recorded size, of the whole clip and in chunks, by the batch and as a stream. */
export const runVaeTiled: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const vae = await load(r, json.model, ctx)
  const checks: Check[] = []
  const tile = json.tile_sample_min_size as number
  const frozen = <T>(fn: () => T): T => noGrad(() => scope(fn))
  const check = async (name: string, record: string, actual: Tensor): Promise<void> => {
    checks.push(await compare(name, actual, expected(r, record), TOLERANCE[ctx.dtype]))
    actual.dispose()
  }
  const x = r.tensor('x', ctx.dtype)
  const z = r.tensor('z', ctx.dtype)
  // Chunk lengths are recorded in pixel frames for encoding, in latent frames for decoding.
  const windows = r.names.map((name) => Number(/^encode\.chunk(\d+)\.mean$/.exec(name)?.[1]))
  for (const frames of [undefined, ...windows.filter((n) => n > 0)]) {
    const window = frames && frames / vae.temporalFactor
    const { mean, logvar } = frozen(() => vae.encode(x, { tile, window }))
    const record = frames ? `encode.chunk${frames}.mean` : 'encode.mean'
    await check(record, record, mean)
    await check(`encode.logvar, window ${window}`, 'encode.logvar', logvar)
  }
  for (const window of [undefined, 1, 2]) {
    const frames = frozen(() => vae.decode(z, { tile, window }))
    await check(`decode.sample, window ${window}`, 'decode.sample', frames)
  }
  const image = frozen(() => vae.encode(slice(x, 2, 0, 1), { tile }).mean)
  await check('encode.image.mean', 'encode.image.mean', image)
  const first = frozen(() => vae.decode(slice(z, 2, 0, 1), { tile }))
  await check('decode.image.sample', 'decode.image.sample', first)
  const stream = vae.decodeStream({ tile })
  const units = frozen(() => {
    const count = z.shape[2] as number
    return concat(
      Array.from({ length: count }, (_, t) => stream.push(slice(z, 2, t, 1))),
      2,
    )
  })
  await check('decode.sample, streamed', 'decode.sample', units)
  for (const held of [stream, x, z, vae]) held.dispose()
  return checks
}

/** Reconstruction and KL loss with the recorded posterior noise, and every gradient of it. */
export const runVaeGrad: CaseRunner = async (dir, json, ctx) => {
  if (ctx.dtype !== 'f32') return []
  const r = new Recorded(dir, json)
  const vae = await load(r, json.model, ctx, true)
  const weight = Number(/([\d.e-]+) \* mean\(kl\)/.exec(json.source)?.[1] ?? 1e-3)
  const x = r.tensor('x')
  x.requiresGrad = true
  const made = scope(() => {
    const posterior = vae.encode(x)
    const frames = vae.decode(samplePosterior(posterior, r.tensor('posterior_noise')))
    const kl = klLoss(posterior)
    // The recorded gradient of x is that of the network's input; the target is a constant.
    const loss = axpby(mean(mse(frames, r.tensor('x'))), kl, 1, weight)
    backward(loss)
    return { ...posterior, frames, kl, loss }
  })
  clearTape()
  const checks: Check[] = [
    await compare('mean', made.mean, expected(r, 'mean'), TOLERANCE.f32),
    await compare('logvar', made.logvar, expected(r, 'logvar'), TOLERANCE.f32),
    await compare('reconstruction', made.frames, expected(r, 'reconstruction'), TOLERANCE.f32),
    scalar('loss', await made.loss.item(), json.loss_value, TOLERANCE.f32),
    scalar('mean KL', await made.kl.item(), average(r.floats('kl')), TOLERANCE.f32),
    await compare('gradient of x', keep(x.grad as Tensor), expected(r, 'input_grad.x'), GRADIENTS),
  ]
  const full = r.file('full_grads.safetensors')
  const record = {
    rows: json.gradient_table.rows,
    values: (name: string) =>
      full?.entries.has(`grad.${name}`)
        ? full.readFloats(`grad.${name}`)
        : r.has(`gsample.${name}`)
          ? r.floats(`gsample.${name}`)
          : undefined,
  }
  checks.push(...(await compareGradients((name) => vae.parameters.get(name)?.grad, record, GRADIENTS)))
  for (const t of [...Object.values(made), x, x.grad]) t?.dispose()
  for (const p of vae.parameters.values()) p.grad?.dispose()
  vae.dispose()
  return checks
}

function average(values: Float32Array): number {
  return values.reduce((sum, v) => sum + v, 0) / values.length
}
