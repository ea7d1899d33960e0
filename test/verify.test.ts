import { cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { sampleIndices } from '../lib/golden/compare.ts'
import { type CaseResult, verifyFolder } from '../lib/golden/verify.ts'
import { openSafetensors, type TensorToWrite, writeSafetensors } from '../lib/io/safetensors.ts'
import { sizeOf } from '../lib/tensor/tensor.ts'
import { goldenFolder } from './golden.ts'

const folder = mkdtempSync(join(tmpdir(), 'pyraflow-verify-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const recorded = readdirSync(goldenFolder).filter((name) => name !== 'models')

let f32: CaseResult[]
beforeAll(async () => {
  f32 = await verifyFolder(goldenFolder)
}, 300_000)

describe('the recorded cases', () => {
  let bf16: CaseResult[]
  beforeAll(async () => {
    bf16 = await verifyFolder(goldenFolder, { dtype: 'bf16' })
  }, 300_000)

  it('are all found', () => {
    expect(f32.map((c) => c.name)).toEqual(recorded.sort())
    expect(f32.length).toBeGreaterThanOrEqual(50)
  })

  it('are all of a kind that can be run', () => {
    expect([...f32, ...bf16].filter((c) => c.status === 'unsupported').map((c) => c.name)).toEqual([])
  })

  it.each(recorded)('pass in f32: %s', (name) => {
    const found = f32.find((c) => c.name === name)
    expect(found, found?.worst).toMatchObject({ status: 'passed' })
    expect(found?.checks.length).toBeGreaterThan(0)
  })

  it('pass in bf16 where bf16 numbers are recorded', () => {
    const bad = bf16.filter((c) => c.status !== 'passed' && c.status !== 'f32-only')
    expect(bad.map((c) => `${c.name}: ${c.worst}`)).toEqual([])
    const passed = bf16.filter((c) => c.status === 'passed').map((c) => c.name)
    for (const start of [
      'dit_flux_a',
      'dit_flux_b',
      'dit_mmdit_a',
      'dit_mmdit_b',
      'vae_a_encode',
      'vae_a_decode',
      'vae_a_tiled',
      'history',
      'stage_jump',
      'text_flux',
      'text_sd3',
    ]) {
      expect(passed.some((name) => name.startsWith(start))).toBe(true)
    }
  })
})

// One number of a copied case is moved by as much as an implementation error would move it.
function corruptedCopy(name: string, tensor: string): string {
  const root = mkdtempSync(join(folder, 'copy-'))
  cpSync(join(goldenFolder, 'models'), join(root, 'models'), { recursive: true })
  cpSync(join(goldenFolder, name), join(root, `renamed_${name}`), { recursive: true })
  const path = join(root, `renamed_${name}`, 'tensors.safetensors')
  const bytes = readFileSync(path)
  const length = Number(bytes.readBigUInt64LE(0))
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + length)) as Record<
    string,
    { data_offsets: [number, number] }
  >
  const at = 8 + length + (header[tensor]?.data_offsets[0] as number)
  bytes.writeFloatLE(bytes.readFloatLE(at) * 1.01 + 0.01, at)
  writeFileSync(path, bytes)
  return root
}

// The folders of another run of the recorder have other names, seeds and sizes: nothing but their content says what
// they are.
describe('cases of other folders', () => {
  it('are recognised and pass under names that say nothing, with models in other places', async () => {
    const root = mkdtempSync(join(folder, 'renamed-'))
    cpSync(join(goldenFolder, 'models'), join(root, 'nets'), { recursive: true })
    const renamed = new Map(recorded.map((name, i) => [name, `z${i}`]))
    const kinds = new Map<string, string>()
    for (const { name, kind } of f32) if (!kinds.has(kind)) kinds.set(kind, name)
    // One case of each kind, and those that another one takes its inputs from.
    for (const name of [...kinds.values(), 'train_loss_flux_b']) {
      const target = join(root, renamed.get(name) as string)
      cpSync(join(goldenFolder, name), target, { recursive: true })
      let text = readFileSync(join(target, 'case.json'), 'utf8').replaceAll('"models/', '"nets/')
      for (const [before, after] of renamed)
        text = text.replaceAll(new RegExp(`"${before}\\b`, 'g'), `"${after}`)
      writeFileSync(join(target, 'case.json'), text)
    }
    const results = await verifyFolder(root)
    expect(results.filter((c) => c.status !== 'passed').map((c) => `${c.kind}: ${c.worst}`)).toEqual([])
    expect(new Set(results.map((c) => c.kind))).toEqual(new Set(kinds.keys()))
  }, 120_000)

  // What the reference would have recorded of a part of its inputs follows from what it recorded of all of them.
  it('pass with other sizes: one image of the batch, a shorter clip', async () => {
    const root = mkdtempSync(join(folder, 'smaller-'))
    cpSync(join(goldenFolder, 'models'), join(root, 'models'), { recursive: true })
    await cutCase('loss_lpips', join(root, 'one'), () => ({ axis: 0, count: 1 }))
    // Causal: the first frames do not know of the later ones.
    const frames = (name: string) => ({ axis: 2, count: name.endsWith('.x') ? 9 : 2 })
    const isWhole = (name: string): boolean => /^video\.(x|mean|logvar)$/.test(name)
    await cutCase('vae_a_encode', join(root, 'two'), frames, isWhole)
    const results = await verifyFolder(root)
    expect(results.map((c) => `${c.name} ${c.status}${c.status === 'passed' ? '' : c.worst}`)).toEqual([
      'one passed',
      'two passed',
    ])
    expect(results[1]?.checks.map((c) => c.name).sort()).toEqual(['video.logvar', 'video.mean'])
  })
})

/** Copies a case with the first steps of one axis of its tensors, those that are wanted. */
async function cutCase(
  source: string,
  target: string,
  cut: (name: string) => { axis: number; count: number },
  wanted: (name: string) => boolean = () => true,
): Promise<void> {
  const json = JSON.parse(readFileSync(join(goldenFolder, source, 'case.json'), 'utf8'))
  const file = openSafetensors(join(goldenFolder, source, 'tensors.safetensors'))
  const kept: TensorToWrite[] = []
  json.tensors = json.tensors.filter(({ name }: { name: string }) => wanted(name) && file.entries.has(name))
  for (const tensor of json.tensors) {
    const { axis, count } = cut(tensor.name)
    const shape = tensor.shape.map((n: number, i: number) => (i === axis ? Math.min(n, count) : n))
    const inner = sizeOf(tensor.shape.slice(axis + 1))
    const values = file
      .readFloats(tensor.name)
      .filter((_, i) => Math.floor(i / inner) % tensor.shape[axis] < shape[axis])
    tensor.shape = shape
    kept.push({ name: tensor.name, dtype: 'F32', shape, data: values })
  }
  mkdirSync(target)
  await writeSafetensors(join(target, 'tensors.safetensors'), kept)
  writeFileSync(join(target, 'case.json'), JSON.stringify({ ...json, case: 'other' }))
}

describe('a corrupted case', () => {
  it.each([
    ['history_t2v_0', 'unit1.stage1.piece0'],
    ['stage_jump', '0.renoised.1'],
    ['train_noise_1', 'targets.2'],
    ['vae_a_decode', 'image.sample'],
    ['dit_flux_b_single', 'output.0'],
    ['dit_mmdit_b_single', 'act.pos_embed.0'],
    ['e2e_mmdit_t2v', 'final_latents'],
    ['e2e_flux_t2i', 'final_latents'],
    ['text_flux', 't5.hidden_states.1'],
    ['text_sd3', 'pooled_prompt_embeds'],
    ['loss_lpips', 'target_grad'],
    ['loss_discriminator_2d', 'logits'],
    ['loss_discriminator_3d', 'input_grad.x'],
    ['loss_vae_gan', 'step0.grad.moments'],
  ])('fails, under any folder name: %s', async (name, tensor) => {
    const [result] = await verifyFolder(corruptedCopy(name, tensor))
    expect(result).toMatchObject({ status: 'failed' })
    expect(result?.error).toBeGreaterThan(result?.tolerance as number)
    // Several ways to one recorded tensor (whole, in chunks, streamed) fail together; nothing else does.
    const failed = result?.checks.filter((check) => !(check.error <= check.tolerance)) ?? []
    expect(new Set(failed.map((check) => check.name.split(',')[0])).size).toBe(1)
  })

  it('fails when its JSON or its tensors cannot be read, and the others still run', async () => {
    const root = mkdtempSync(join(folder, 'broken-'))
    for (const name of ['scheduler_0', 'scheduler_1', 'stage_jump']) {
      cpSync(join(goldenFolder, name), join(root, name), { recursive: true })
    }
    writeFileSync(join(root, 'scheduler_0', 'case.json'), '{"case": ')
    writeFileSync(join(root, 'stage_jump', 'tensors.safetensors'), 'short')
    const results = await verifyFolder(root)
    expect(results.map((c) => c.status)).toEqual(['failed', 'passed', 'failed'])
    expect(results[2]?.worst).toMatch(/tensors\.safetensors/)
  })
})

describe('verifying a folder', () => {
  it('names a kind it does not know instead of failing it', async () => {
    const root = mkdtempSync(join(folder, 'later-'))
    cpSync(join(goldenFolder, 'scheduler_0'), join(root, 'other'), { recursive: true })
    writeFileSync(join(root, 'other', 'case.json'), JSON.stringify({ case: 'other', what: 'something new' }))
    const results = await verifyFolder(root)
    expect(results.map((c) => [c.status, c.kind])).toEqual([['unsupported', 'unknown']])
  })

  it('filters by name, and stops between cases when asked to', async () => {
    const seen: string[] = []
    const controller = new AbortController()
    const onCase = (c: CaseResult): void => {
      seen.push(c.name)
      controller.abort()
    }
    const options = { filter: 'scheduler', signal: controller.signal, onCase }
    await expect(verifyFolder(goldenFolder, options)).rejects.toMatchObject({ code: 'ERR_ABORTED' })
    expect(seen).toEqual(['scheduler_0'])
  })

  it('refuses a folder that does not exist or holds no case', async () => {
    await expect(verifyFolder(join(folder, 'nothing'))).rejects.toMatchObject({ code: 'ERR_IO' })
    await expect(verifyFolder(join(goldenFolder, 'scheduler_0'))).rejects.toThrow(/case\.json/)
  })
})

describe('sample positions', () => {
  it('round half to even, as the recordings do', () => {
    expect(sampleIndices(5, 10)).toEqual([0, 1, 2, 3, 4])
    expect(sampleIndices(6, 3)).toEqual([0, 2, 5])
    expect(sampleIndices(8, 3)).toEqual([0, 4, 7])
    expect(sampleIndices(1, 4)).toEqual([0])
  })
})
