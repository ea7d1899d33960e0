import { cpSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { openSafetensors, writeSafetensors } from '../lib/io/safetensors.ts'
import { Pipeline } from '../lib/pipeline.ts'
import { live } from './fixtures/memory.ts'
import { writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'model-folder-'))
const model = join(folder, 'model')

beforeAll(() => writePipeline(model))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

describe('a model folder', () => {
  const weights = (part: string): string => join(part, 'diffusion_pytorch_model.safetensors')
  const dit = weights('diffusion_transformer')
  const vae = weights('causal_video_vae')
  type Content = Map<string, { shape: number[]; data: Float32Array }>
  async function rewrite(path: string, change: (tensors: Content) => void): Promise<void> {
    const file = openSafetensors(path)
    const tensors: Content = new Map()
    for (const [name, { shape }] of file.entries)
      tensors.set(name, { shape: [...shape], data: file.readFloats(name) })
    change(tensors)
    await writeSafetensors(
      path,
      Array.from(tensors, ([name, t]) => ({ name, dtype: 'F32' as const, ...t })),
    )
  }
  const cases: [string, (dir: string) => Promise<void> | void, RegExp][] = [
    [
      'without a transformer',
      (d) => rmSync(join(d, 'diffusion_transformer'), { recursive: true }),
      /diffusion_transformer/,
    ],
    ['without a VAE', (d) => rmSync(join(d, 'causal_video_vae'), { recursive: true }), /causal_video_vae/],
    [
      'without a config',
      (d) => rmSync(join(d, 'diffusion_transformer', 'config.json')),
      /transformer.config\.json/,
    ],
    ['without weights', (d) => rmSync(join(d, vae)), /causal_video_vae/],
    ['without a text encoder', (d) => rmSync(join(d, 'text_encoder'), { recursive: true }), /text_encoder/],
    [
      'with another text encoder',
      (d) => writeFileSync(join(d, 'text_encoder', 'config.json'), '{"_class_name":"X"}'),
      /X/,
    ],
    [
      'with an incomplete text encoder',
      (d) => writeFileSync(join(d, 'text_encoder', 'config.json'), '{"_class_name":"WordEncoder"}'),
      /vocabulary/,
    ],
    [
      'whose pyraflow.json is not JSON',
      (d) => writeFileSync(join(d, 'pyraflow.json'), '{'),
      /pyraflow\.json/,
    ],
    [
      'with a NaN in the transformer',
      (d) => rewrite(join(d, dit), (t) => t.get('proj_out.weight')!.data.fill(Number.NaN, 3, 4)),
      /proj_out\.weight/,
    ],
    [
      'with a NaN in the VAE',
      (d) => rewrite(join(d, vae), (t) => t.get('decoder.conv_in.conv.bias')!.data.fill(Number.NaN, 0, 1)),
      /decoder\.conv_in\.conv\.bias/,
    ],
    [
      'with a missing key',
      (d) => rewrite(join(d, vae), (t) => t.delete('encoder.conv_in.conv.weight')),
      /encoder\.conv_in\.conv\.weight.*\[8, 3, 3, 3, 3\]/,
    ],
    [
      'with an extra key',
      (d) => rewrite(join(d, dit), (t) => t.set('more', { shape: [1], data: new Float32Array(1) })),
      /more/,
    ],
    ['with truncated weights', (d) => truncateSync(join(d, dit), 5000), /diffusion_pytorch_model/],
    ['with empty weights', (d) => truncateSync(join(d, vae), 0), /diffusion_pytorch_model/],
  ]
  for (const [name, change, message] of cases) {
    test(`${name} is refused and leaves no memory behind`, async () => {
      const dir = join(folder, name.replaceAll(' ', '-'))
      cpSync(model, dir, { recursive: true })
      await change(dir)
      const before = await live()
      await expect(Pipeline.load(dir)).rejects.toMatchObject({
        name: 'PyraflowError',
        code: expect.stringMatching(/^ERR_(CHECKPOINT|IO)$/),
        message: expect.stringMatching(message),
      })
      expect(await live()).toBe(before)
    })
  }

  test('that is not there, or lacks the variant asked for, is named', async () => {
    await expect(Pipeline.load(join(folder, 'nowhere'))).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining('nowhere'),
    })
    await expect(Pipeline.load(model, { variant: 'diffusion_transformer_768p' })).rejects.toMatchObject({
      code: 'ERR_CHECKPOINT',
      message: expect.stringContaining('diffusion_transformer_768p'),
    })
  })
})
