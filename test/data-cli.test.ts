import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { makePicture } from './fixtures/clips.ts'
import { commandLine } from './fixtures/compiled.ts'
import { CAPTIONS, writePipeline } from './fixtures/tiny.ts'

const folder = mkdtempSync(join(tmpdir(), 'pyraflow-data-cli-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

// Pictures, so that no film program is needed; the fourth is damaged.
const pictures = join(folder, 'pictures')
const sizes = ['--bucket', '64x64x1', '--bucket', '96x64x1']
beforeAll(async () => {
  await writePipeline(join(folder, 'model'))
  mkdirSync(pictures)
  for (const [i, text] of CAPTIONS.entries()) {
    await makePicture(join(pictures, `${i}.png`), { seed: i, width: i === 2 ? 150 : 100, height: 100 })
    writeFileSync(join(pictures, `${i}.txt`), text)
  }
  writeFileSync(join(pictures, '9.png'), 'no picture')
  writeFileSync(join(pictures, '9.txt'), 'a red square')
})

function run(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  const { status, stdout, stderr } = spawnSync(process.execPath, [commandLine(), ...args], {
    encoding: 'utf8',
    cwd: folder,
  })
  return { status, stdout, stderr }
}

test('encode fills a latent and a text cache, names what is left out, and continues', () => {
  const args = ['encode', 'pictures', '--vae', 'model/causal_video_vae', '--out', 'cache', ...sizes, '--json']
  const failed = run(...args)
  expect(failed.stderr).toMatch(/9\.png/)
  expect(failed.status).toBe(1)
  const first = run(...args, '--on-bad', '1', '--text-encoder', 'model')
  expect(first.stderr).toMatch(/left out: .*9\.png/)
  expect(first.stderr).toMatch(/4 clips, 4 encoded, 0 found in the cache, 1 left out/)
  expect(first.status).toBe(0)
  expect(JSON.parse(first.stdout)).toMatchObject({
    clips: 4,
    encoded: 4,
    bad: [{ reason: 'unreadable' }],
    texts: { texts: 5, encoded: 5 },
  })
  const again = run(...args, '--on-bad', 'skip', '--text-encoder', 'model')
  expect(JSON.parse(again.stdout)).toMatchObject({ encoded: 0, reused: 4, texts: { encoded: 0, reused: 5 } })
  expect(readdirSync(join(folder, 'cache')).sort()).toEqual(['index.jsonl', 'shards', 'text'])
  const other = run(...args, '--on-bad', 'skip', '--dtype', 'bf16')
  expect(other.stderr).toMatch(/latents of 4 clips in the folder were made with another dtype.*made anew/)
  expect(JSON.parse(other.stdout)).toMatchObject({ encoded: 4, reused: 0 })
})

test('train reads the text cache in place of an encoder', () => {
  run(
    'encode',
    'pictures',
    '--vae',
    'model/causal_video_vae',
    '--out',
    'square',
    '--on-bad',
    'skip',
    ...[...['--width', '64', '--height', '64', '--frames', '1', '--text-encoder', 'model']],
  )
  const network = {
    ...{ num_layers: 1, num_single_layers: 1, attention_head_dim: 16, num_attention_heads: 2 },
    ...{ joint_attention_dim: 12, pooled_projection_dim: 12, axes_dims_rope: [4, 6, 6] },
  }
  writeFileSync(join(folder, 'train.json'), JSON.stringify({ network, dtype: 'f32' }))
  const args = ['train', '--config', 'train.json', '--data', 'square', '--text-cache', 'square/text']
  const { status, stderr } = run(...args, '--out', 'run', '--steps', '2', '--batch-size', '4')
  expect(stderr).toMatch(/no text encoder/)
  expect(status).toBe(0)
  expect(existsSync(join(folder, 'run', 'model', 'diffusion_transformer', 'config.json'))).toBe(true)
  const both = run(...args, '--text-encoder', 'model', '--out', 'run', '--steps', '2', '--batch-size', '4')
  expect(both.stderr).toMatch(/either --text-encoder or --text-cache/)
  expect(both.status).toBe(2)
})

test.each([
  [['encode', 'pictures', '--vae', 'x', '--out', 'y'], /missing --width, --height and --frames, or --bucket/],
  [['encode', 'pictures', '--vae', 'x', '--out', 'y', '--width', '64'], /belong together/],
  [['encode', 'pictures', '--vae', 'x', '--out', 'y', '--width', '64', ...sizes], /either --width/],
  [['encode', 'pictures', '--vae', 'x', '--out', 'y', '--bucket', '64'], /640x384x121/],
  [['encode', 'pictures', '--vae', 'x', '--out', 'y', '--on-bad', 'some'], /whole number/],
  [['doctor', 'data'], /missing required argument/],
])('%j ends with exit code 2 and says why', (args, why) => {
  const { status, stderr, stdout } = run(...args)
  expect(stderr).toMatch(why)
  expect(stdout).toBe('')
  expect(status).toBe(2)
})
