import { spawn, spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import sharp from 'sharp'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { makeProgress } from '../lib/cli/progress.ts'
import { tinyLatents, tinyVae, writePipeline } from './fixtures/tiny.ts'
import { goldenFolder } from './golden.ts'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const built = join(root, 'out/test-dist')
const main = join(built, 'lib/cli/main.js')
const folder = mkdtempSync(join(tmpdir(), 'pyraflow-cli-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

// The program runs as users run it: as JavaScript in a process of its own, made from the sources under test.
beforeAll(() => {
  const tsc = join(root, 'node_modules/typescript/bin/tsc')
  const args = ['-p', 'tsconfig.json', '--noCheck', '--declaration', 'false']
  const made = spawnSync(process.execPath, [tsc, ...args, '--outDir', built], { cwd: root, encoding: 'utf8' })
  if (made.status !== 0) throw new Error(made.stdout)
}, 120_000)

function run(args: string[], env: Record<string, string> = {}) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args], {
    encoding: 'utf8',
    cwd: folder,
    env: { ...process.env, ...env },
  })
  return { status, stdout, stderr }
}

describe('the command line', () => {
  it('explains itself on stdout', () => {
    const { status, stdout, stderr } = run(['--help'])
    expect(status).toBe(0)
    expect(stderr).toBe('')
    for (const name of ['generate', 'plan', 'train', 'encode', 'verify', 'info'])
      expect(stdout).toContain(name)
    expect(run(['generate', '--help']).stdout).toContain('--prompt')
    expect(run(['--version']).stdout.trim()).toBe(
      JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).version,
    )
  })

  it.each([
    [['verfy'], /Did you mean verify/],
    [['verify', 'x', '--filtr', 'y'], /Did you mean --filter/],
    [['verify'], /missing required argument/],
    [['verify', 'x', '--dtype', 'f64'], /f32, bf16/],
    [['generate', '--width', 'wide'], /whole number/],
    [['generate', '--model', 'x'], /missing --prompt/],
    [['generate', '--model', 'x', '--prompt', 'y', '--out', 'z.mov'], /\.webp/],
    [['train', '--width', '64'], /--width is not a setting of task dit/],
    [['train', '--data', 'x', '--out', 'y', '--steps', '1', '--batch-size', '1', '--dtype', 'f16'], /dtype/],
    [['train', '--config', 'missing.json'], /missing\.json/],
    [['encode', 'clips'], /missing --vae/],
  ])('ends %j with exit code 2 and says why on stderr', (args, why) => {
    const { status, stdout, stderr } = run(args)
    expect(stderr).toMatch(why)
    expect(stderr).not.toMatch(/\n\s+at /)
    expect(stdout).toBe('')
    expect(status).toBe(2)
  })

  it('reports a failure in one line with exit code 1, and the stack only when asked', () => {
    const args = ['generate', '--model', 'nowhere', '--prompt', 'a circle']
    const { status, stderr } = run(args)
    expect(status).toBe(1)
    expect(stderr.trim().split('\n').length).toBe(1)
    expect(stderr).toContain('nowhere')
    expect(run(args, { PYRAFLOW_DEBUG: '1' }).stderr).toMatch(/\n\s+at /)
  })
})

describe('settings', () => {
  const settings = { data: 'cache', out: 'run', steps: 10, batchSize: 4, learningRate: 1e-3, seed: 5 }
  const config = join(folder, 'train.json')

  it('come from flags, then variables, then the file, then defaults', () => {
    writeFileSync(config, JSON.stringify(settings))
    const env = { PYRAFLOW_SEED: '6', PYRAFLOW_STEPS: '20' }
    const { status, stdout } = run(['train', '--config', config, '--dry-run', '--steps', '30'], env)
    expect(status).toBe(0)
    expect(JSON.parse(stdout)).toMatchObject({
      steps: 30,
      seed: 6,
      learningRate: 1e-3,
      captionDrop: 0.1,
      task: 'dit',
    })
  })

  it.each([
    [{ lerningRate: 1 }, /unknown setting "lerningRate"; did you mean "learningRate"/],
    [{ optimizer: { weigthDecay: 1 } }, /"optimizer\.weigthDecay"; did you mean "weightDecay"/],
    [{ network: { num_layer: 1 } }, /"network\.num_layer"; did you mean "num_layers"/],
    [
      { network: { _class_name: 'PyramidDiffusionMMDiT', num_single_layers: 1 } },
      /"network\.num_single_layers"; did you mean "num_layers"/,
    ],
    [{ steps: 0 }, /steps/],
    [{ task: 'vae' }, /missing --width/],
  ])('%o in the file is a usage error', (extra, why) => {
    writeFileSync(config, JSON.stringify({ ...settings, ...extra }))
    const { status, stderr } = run(['train', '--config', config, '--dry-run'])
    expect(stderr).toMatch(why)
    expect(status).toBe(2)
  })
})

describe('train', () => {
  const network = {
    ...{ num_layers: 1, num_single_layers: 1, attention_head_dim: 16, num_attention_heads: 2 },
    ...{ joint_attention_dim: 12, pooled_projection_dim: 12, axes_dims_rope: [4, 6, 6] },
  }
  const config = join(folder, 'objective.json')
  const settings = {
    ...{ data: join(folder, 'latents'), validation: join(folder, 'held'), out: join(folder, 'run') },
    ...{ network, steps: 2, batchSize: 4, accumulate: 1, validateEvery: 1, imageRatio: 0.25 },
    optimizer: { decayGroups: [{ match: '^norm', weightDecay: 0.1 }] },
    ...{ samplePrompts: ['a red circle'], sampleEvery: 1, vae: join(folder, 'vae') },
    sampleOptions: { steps: 1, videoSteps: 1 },
  }
  const write = (extra: object = {}): void => writeFileSync(config, JSON.stringify({ ...settings, ...extra }))
  beforeAll(async () => {
    for (const name of ['latents', 'held']) (await tinyLatents(join(folder, name), { frames: 3 })).dispose()
    const vae = tinyVae()
    await vae.save(join(folder, 'vae'))
    vae.dispose()
  })

  it('prints what a step takes before anything is there', () => {
    write()
    const json = run(['train', '--config', config, '--plan', '--json', '--accumulate', '2'])
    expect(json.stderr).toBe('')
    const { bytes, tokens, flops, seconds } = JSON.parse(json.stdout)
    expect(bytes.peak).toBeGreaterThan(bytes.weights)
    expect(tokens.longest).toBeGreaterThan(tokens.shortest)
    expect(flops.mean).toBeGreaterThan(0)
    expect(seconds.mean).toBeGreaterThan(0)
    const text = run(['train', '--config', config, '--plan'])
    expect(text.stdout).toMatch(/M parameters.*\nmemory: .*\na step: .*\nabout /)
    expect(readdirSync(folder)).not.toContain('run')
  })

  it('goes through every branch first when asked to, and then trains', () => {
    write({ rehearse: true })
    const { status, stderr, stdout } = run(['train', '--config', config, '--progress', 'none'])
    expect(status, stderr).toBe(0)
    for (const branch of ['units', 'first frames', 'without captions', 'validation', 'samples', 'checkpoint'])
      expect(stderr).toMatch(new RegExp(`rehearsed .*${branch}.* s, `))
    expect(stdout.trim()).toBe(join(folder, 'run', 'model'))
  })

  it.each([
    [{ optimizer: { decayGroups: [{ match: '(', weightDecay: 1 }] } }, /decayGroups/],
    [{ sampleOptions: { stepps: 1 } }, /did you mean "steps"/],
    [{ imageRatio: 2 }, /imageRatio/],
  ])('%o is a usage error', (extra, why) => {
    write(extra)
    const { status, stderr } = run(['train', '--config', config])
    expect(stderr).toMatch(why)
    expect(status).toBe(2)
  })
})

describe('generate', () => {
  const model = join(folder, 'model')
  const base = ['generate', '--model', model, '--prompt', 'a red circle', '--progress', 'none']
  beforeAll(() => writePipeline(model))

  it('writes a video with its recipe and makes it again from there', () => {
    const first = run([
      ...base,
      '--frames',
      '9',
      '--seed',
      '3',
      '--guidance',
      '3,2',
      '--out',
      'a.webp',
      '--json',
    ])
    expect(first.stderr).toBe('')
    const { out, recipe } = JSON.parse(first.stdout)
    expect(out).toBe('a.webp')
    expect(recipe).toMatchObject({ prompt: 'a red circle', seed: 3, frames: 9, guidance: [3, 2] })
    const args = ['generate', '--model', model, '--recipe', 'a.webp', '--out', 'b.webp', '--progress', 'none']
    expect(run(args)).toMatchObject({ status: 0, stdout: 'b.webp\n' })
    expect(readFileSync(join(folder, 'b.webp'))).toEqual(readFileSync(join(folder, 'a.webp')))
    const dry = JSON.parse(run([...args, '--dry-run', '--seed', '4', '--seconds', '2']).stdout)
    expect(dry).toMatchObject({ seed: 4, frames: 17, guidance: [3, 2] })
  })

  it('goes on with what is kept of a video, and says what it is not', () => {
    const args = [...base, '--frames', '9', '--resume', 'kept']
    expect(run([...args, '--out', 'once.webp']).status).toBe(0)
    expect(readdirSync(join(folder, 'kept'))).toEqual(['video-0.latents.safetensors'])
    expect(run([...args, '--out', 'twice.webp']).status).toBe(0)
    expect(readFileSync(join(folder, 'twice.webp'))).toEqual(readFileSync(join(folder, 'once.webp')))
    const { status, stderr } = run([...args, '--seed', '77', '--out', 'never.webp'])
    expect([status, stderr]).toEqual([1, expect.stringMatching(/seed: expected 77/)])
  })

  it('keeps to a limit on memory, or says why it cannot', () => {
    const dry = JSON.parse(run([...base, '--max-memory', '1e9', '--dry-run']).stdout)
    expect(dry.plan.offloaded).toBe(0)
    const { status, stderr } = run([...base, '--max-memory', '1000', '--out', 'never.webp'])
    expect([status, stderr]).toEqual([1, expect.stringMatching(/to fit in maxMemory, 1000 bytes/)])
    expect(existsSync(join(folder, 'never.webp'))).toBe(false)
  })

  it('continues a video from its latents, with previews of what comes', () => {
    expect(run([...base, '--frames', '1', '--out', 'c.webp', '--latents']).status).toBe(0)
    const more = ['--continue-from', 'c.webp.latents.safetensors', '--frames', '8', '--preview', 'small']
    expect(run([...base, ...more, '--out', 'd.webp']).status).toBe(0)
    expect(run([...base, '--frames', '9', '--out', 'e.webp']).status).toBe(0)
    expect(readdirSync(join(folder, 'small'))).toEqual([
      'video-0-unit-1-stage-0.png',
      'video-0-unit-1-stage-1.png',
    ])
    // The pictures are the same; what was made how is not.
    return Promise.all(
      ['d.webp', 'e.webp'].map((name) => sharp(join(folder, name), { animated: true }).raw().toBuffer()),
    ).then(([d, e]) => expect(d!.equals(e!)).toBe(true))
  })

  it('makes a batch and later prompts, and warns of what is cut', () => {
    const args = [
      '--prompt',
      'a blue square moving left on black',
      '--videos-per-prompt',
      '2',
      '--frames',
      '1',
    ]
    const { stdout, stderr, status } = run([...base, ...args, '--out', 'many.webp', '--json'])
    expect(status).toBe(0)
    expect(stderr).toMatch(/warning: The prompt is longer than 5 words; the model does not see "on black"/)
    const { videos } = JSON.parse(stdout)
    expect(
      videos.map(({ out, recipe }: { out: string; recipe: { seed: number } }) => [out, recipe.seed]),
    ).toEqual([
      ['many-0.webp', 0],
      ['many-1.webp', 1],
      ['many-2.webp', 0],
      ['many-3.webp', 1],
    ])
    const dry = run([...base, '--from', '1:a blue square', '--from', '0.5: a blue circle', '--dry-run'])
    expect(JSON.parse(dry.stdout).promptChanges).toEqual([
      { from: 0.5, prompt: 'a blue circle' },
      { from: 1, prompt: 'a blue square' },
    ])
  })

  it.each([
    [['--seconds', '1e9'], 2, /video length: expected at most/],
    [['--width', '128'], 2, /size: expected 64×64/],
    [['--from', 'soon:x'], 2, /Expected a number/],
    [['--image', 'none.png'], 1, /none\.png/],
    [['--recipe', 'none.webp'], 1, /none\.webp/],
    [['--steps', '1,1'], 2, /steps: expected 3/],
  ])('ends %j with exit code %i', (args, code, why) => {
    const { status, stderr } = run([...base, ...args])
    expect(stderr).toMatch(why)
    expect(stderr).not.toMatch(/\n\s+at /)
    expect(status).toBe(code)
  })
})

describe('info', () => {
  it('is one JSON object with --json', () => {
    const { status, stdout } = run(['info', '--json'], { PYRAFLOW_THREADS: '1' })
    expect(status).toBe(0)
    const info = JSON.parse(stdout)
    expect(info.device.threads).toBe(1)
    expect(info.backends.map((b: { name: string }) => b.name)).toContain(info.device.backend)
    expect(info.versions.node).toBe(process.version)
    expect(typeof info.ffmpeg.found).toBe('boolean')
  })

  it('says why backends are not used', () => {
    const { stdout } = run(['info', '--backend', 'base'])
    expect(stdout).toMatch(/cpu_base: in use/)
    expect(stdout).toMatch(/cuda: not usable \(.+\)/)
  })
})

describe('verify', () => {
  it('prints a line a case and exits 0 when all pass', () => {
    const { status, stdout, stderr } = run([
      'verify',
      goldenFolder,
      '--filter',
      'scheduler',
      '--device',
      'cpu',
    ])
    expect(status).toBe(0)
    const lines = stdout.trim().split('\n')
    expect(lines.length).toBe(4)
    for (const line of lines) expect(line).toMatch(/^ok +scheduler_\S+ +[\d.e-]+ ≤ [\d.e-]+/)
    expect(stderr).toMatch(/4 passed, 0 failed/)
  })

  it('exits 1 when a case fails, and writes the numbers as JSON', () => {
    const cases = join(folder, 'cases')
    cpSync(join(goldenFolder, 'train_stage_lengths'), join(cases, 'lengths'), { recursive: true })
    const file = join(cases, 'lengths', 'case.json')
    const json = JSON.parse(readFileSync(file, 'utf8'))
    json.table[0].first_four_calls[0][0]++
    writeFileSync(file, JSON.stringify(json))
    const report = join(folder, 'report.json')
    const { status, stdout } = run(['verify', cases, '--json', report])
    expect(status).toBe(1)
    expect(stdout).toMatch(/^FAILED/)
    expect(JSON.parse(readFileSync(report, 'utf8'))).toMatchObject({
      failed: 1,
      cases: [{ status: 'failed' }],
    })
  })

  it('exits 1 for a filter that matches nothing and for an unknown device', () => {
    expect(run(['verify', goldenFolder, '--filter', 'no such case']).status).toBe(1)
    const { status, stderr } = run(['verify', goldenFolder, '--device', 'abacus'])
    expect(status).toBe(1)
    expect(stderr).toContain('abacus')
  })

  it('puts only JSON on stdout with a bare --json', () => {
    const { stdout } = run(['verify', goldenFolder, '--filter', 'scheduler_0', '--json'])
    expect(JSON.parse(stdout)).toMatchObject({ passed: 1, dtype: 'f32' })
  })

  it.each([1, 2])('ends with exit code 130 after %i interrupts', async (times) => {
    const child = spawn(process.execPath, [main, 'verify', goldenFolder], { cwd: folder })
    let errors = ''
    child.stderr.on('data', (data) => {
      errors += data
      if (times === 2 && /press Ctrl-C again/.test(errors)) child.kill('SIGINT')
    })
    child.stdout.once('data', () => child.kill('SIGINT'))
    const code = await new Promise((resolve) => child.on('exit', resolve))
    expect(code).toBe(130)
    expect(errors).toMatch(/press Ctrl-C again/)
  })
})

describe('progress', () => {
  function written(mode: 'auto' | 'plain' | 'json' | 'none', isTTY: boolean): string {
    let text = ''
    const write = (piece: string): boolean => {
      text += piece
      return true
    }
    const progress = makeProgress(mode, { isTTY, columns: 80, write } as unknown as NodeJS.WriteStream)
    for (let done = 1; done <= 100; done++) progress.update({ label: 'step', done, total: 100, etaMs: 1000 })
    progress.end()
    return text
  }

  it('redraws a bar on a terminal only', () => {
    expect(written('auto', true)).toContain('█')
    expect(written('auto', true)).toContain('\r')
    expect(written('auto', false)).toBe('step 1/100 · 1 s left\nstep 100/100\n')
    expect(written('plain', true)).toBe(written('auto', false))
  })

  it('writes one JSON object a line, or nothing', () => {
    const lines = written('json', true).trim().split('\n')
    expect(JSON.parse(lines[99] as string)).toEqual({
      type: 'progress',
      label: 'step',
      done: 100,
      total: 100,
      etaMs: 1000,
    })
    expect(written('none', true)).toBe('')
  })
})
