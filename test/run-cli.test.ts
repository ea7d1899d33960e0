import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { latestCheckpoint } from '../lib/train/run.ts'
import { type Child, startChild } from './fixtures/compiled.ts'
import { tinyLatents } from './fixtures/tiny.ts'
import { noted } from './fixtures/toy-run.ts'

const folder = mkdtempSync(join(tmpdir(), 'run-cli-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const network = JSON.stringify({
  ...{ num_layers: 1, num_single_layers: 1, attention_head_dim: 16, num_attention_heads: 2 },
  ...{ joint_attention_dim: 12, pooled_projection_dim: 12, axes_dims_rope: [4, 6, 6] },
})

/** `pyraflow train` of a tiny network in a folder of its own, with further flags. */
async function train(name: string, steps: number, ...flags: string[]): Promise<Child> {
  const { writeFile } = await import('node:fs/promises')
  const config = join(folder, 'train.json')
  await writeFile(config, `{ "network": ${network}, "batchSize": 4, "seed": 3, "dtype": "f32" }`)
  const paths = ['--data', join(folder, 'latents'), '--out', join(folder, name)]
  return startChild('child-cli', ['train', '--config', config, ...paths, '--steps', String(steps), ...flags])
}

describe('pyraflow train', () => {
  beforeAll(async () => {
    ;(await tinyLatents(join(folder, 'latents'), { count: 9 })).dispose()
  })

  test('saves and ends with 130 on SIGTERM and SIGINT, and --resume ends as an undisturbed run does', async () => {
    const flags = ['--accumulate', '2', '--checkpoint-every', '3', '--progress', 'json']
    const whole = await train('whole', 14, ...flags)
    const { code, stderr } = await whole.exit
    expect(code, stderr).toBe(0)
    for (const signal of ['SIGTERM', 'SIGINT'] as const) {
      const child = await train(signal, 14, ...flags)
      const ended = child.exit
      await child.error((text) => text.includes('"done":4'))
      child.process.kill(signal)
      const first = await ended
      expect(first.code, first.stderr).toBe(130)
      expect(first.stderr).toMatch(/stopping after this step.*\n/)
      const saved = await latestCheckpoint(join(folder, signal))
      expect(saved?.step).toBeGreaterThanOrEqual(4)
      const second = await train(signal, 14, ...flags, '--resume')
      const rest = await second.exit
      expect(rest.code, rest.stderr).toBe(0)
      expect(rest.stderr).toContain(`{"type":"resume","step":${saved?.step}}`)
      expect(noted(join(folder, signal))).toEqual(noted(join(folder, 'whole')))
    }
  })

  test('says what happened besides steps, keeps as many checkpoints as asked for, and draws the curves', async () => {
    const latents = await tinyLatents(join(folder, 'latents-nan'), { value: Number.NaN })
    latents.dispose()
    const child = await train('bad', 8, '--data', join(folder, 'latents-nan'), '--non-finite', 'rollback')
    const { code, stderr } = await child.exit
    expect(code).toBe(1)
    expect(stderr).toContain(
      'pyraflow: step 1: no finite loss (stage0, stage1, stage2); back to the weights of step 0',
    )
    expect(stderr).toMatch(/training step 5: loss NaN.*5 times after one checkpoint/)

    const kept = await train(
      'kept',
      5,
      '--checkpoint-every',
      '1',
      '--keep-checkpoints',
      '3',
      '--max-loss',
      '1e-9',
    )
    const end = await kept.exit
    expect(end.code).toBe(1)
    expect(end.stderr).toMatch(/pyraflow: step 1 skipped: loss \d/)
    const names = readdirSync(join(folder, 'kept')).sort()
    expect(names).toEqual(['checkpoint-2', 'checkpoint-3', 'checkpoint-4', 'loss.svg', 'metrics.jsonl'])
  })

  test.each([
    [['--non-finite', 'hope'], /nonFinite/],
    [['--accumulate', '0'], /accumulate/],
    [['--validate-every', '5'], /--validate-every needs --validation/],
    [['--sample-prompts', 'a red circle', '--sample-every', '5'], /--sample-prompts needs --vae/],
  ])('ends %j with exit code 2 and says why', async (flags, why) => {
    const child = await train('usage', 2, ...flags)
    const { code, stderr } = await child.exit
    expect(stderr).toMatch(why)
    expect(code).toBe(2)
    expect(existsSync(join(folder, 'usage'))).toBe(false)
  })

  test('refuses to begin where another run is, and says to resume it', async () => {
    expect((await (await train('twice', 2)).exit).code).toBe(0)
    const { code, stderr } = await (await train('twice', 4)).exit
    expect(code).toBe(2)
    expect(stderr).toMatch(/step 2.*Resume that run/)
  })
})
