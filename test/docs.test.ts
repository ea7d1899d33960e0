import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { makeClips } from '../examples/shapes/make-clips.ts'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const scratch = join(root, 'out/docs-check')

interface Block {
  where: string
  language: string
  code: string
}

function blocks(): Block[] {
  const docs = existsSync(join(root, 'docs')) ? readdirSync(join(root, 'docs')) : []
  const files = ['README.md', 'CONTRIBUTING.md', ...docs.map((name) => `docs/${name}`)]
  return files
    .filter((file) => file.endsWith('.md') && existsSync(join(root, file)))
    .flatMap((file) => {
      const text = readFileSync(join(root, file), 'utf8')
      return [...text.matchAll(/^```(\w+)[^\n]*\n(.*?)^```/gms)].map((match) => ({
        where: `${file}:${text.slice(0, match.index).split('\n').length}`,
        language: match[1]!,
        code: match[2]!,
      }))
    })
}

test('every TypeScript and JavaScript block in the documentation type-checks and runs', async () => {
  const examples = blocks().filter(({ language }) => language === 'ts' || language === 'js')
  rmSync(scratch, { recursive: true, force: true })
  mkdirSync(scratch, { recursive: true })
  // The package by its own name; the empty export makes each block a module with names of its own.
  examples.forEach(({ code }, index) => {
    writeFileSync(join(scratch, `block${index}.ts`), `${code}\nexport {}\n`)
  })
  const config = {
    extends: '../../tsconfig.check.json',
    compilerOptions: {
      noEmit: false,
      rootDir: '../..',
      outDir: 'js',
      paths: { pyraflow: ['../../lib/index.ts'], 'pyraflow/train': ['../../lib/train/index.ts'] },
    },
    include: ['*.ts'],
  }
  if (examples.length === 0) return
  writeFileSync(join(scratch, 'tsconfig.json'), JSON.stringify(config))
  const tsc = join(root, 'node_modules/typescript/bin/tsc')
  const { status, stdout } = spawnSync(process.execPath, [tsc, '-p', scratch], { encoding: 'utf8' })
  const named = stdout.replace(/\S*block(\d+)\.ts/g, (_, index) => `${examples[Number(index)]!.where} block`)
  expect(named).toBe('')
  expect(status).toBe(0)

  // They run where a reader would try them: beside the examples, with a folder of clips.
  const place = join(scratch, 'place')
  mkdirSync(place)
  symlinkSync(join(root, 'examples'), join(place, 'examples'))
  await makeClips({ out: join(place, 'clips'), count: 16 })
  for (const [index, { where }] of examples.entries()) {
    const script = join(scratch, 'js/out/docs-check', `block${index}.js`)
    // A reader waits for a thousand steps; that they begin and end well shows in two.
    writeFileSync(script, readFileSync(script, 'utf8').replace(/steps: \d+,/, 'steps: 2,'))
    const result = spawnSync(process.execPath, [script], { cwd: place, encoding: 'utf8', timeout: 100_000 })
    expect(result.status, `${where}\n${result.stderr}`).toBe(0)
  }
  expect(existsSync(join(place, 'circle.webp'))).toBe(true)
  expect(existsSync(join(place, 'runs/mine/checkpoint-2/diffusion_transformer/config.json'))).toBe(true)
}, 300_000)

const scripts: Record<string, string> = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).scripts
const otherTools = ['cd', 'git', 'cmake', 'export', 'flock']

// Why a documented command cannot work, or null.
function complaint(line: string): string | null {
  const words = line.trim().replace(/^\$ /, '').split(/\s+/)
  while (/^[A-Z_]+=/.test(words[0] ?? '')) words.shift()
  const [command = '', first = '', second = ''] = words
  if (command === 'npm') {
    if (['ci', 'install', 'i', 'pack'].includes(first)) return null
    const name = first === 'run' ? second : first
    return scripts[name] ? null : `no npm script ${name}`
  }
  if (command === 'npx' || command === 'pyraflow') {
    const [tool, subcommand] = command === 'npx' ? [first, second] : [command, first]
    if (tool !== 'pyraflow')
      return existsSync(join(root, 'node_modules/.bin', tool)) ? null : `no tool ${tool}`
    return existsSync(join(root, 'lib/cli', `${subcommand}.ts`)) ? null : `no subcommand ${subcommand}`
  }
  if (command === 'node') {
    const source = first.replace(/^dist\/(.*)\.js$/, '$1.ts')
    return existsSync(join(root, source)) ? null : `no file ${first}`
  }
  if (command === '.ci/run') return existsSync(join(root, command)) ? null : 'no .ci/run'
  // Built programs are looked up as targets, since a checkout without a build is documented too.
  if (command.startsWith('out/')) return command.endsWith('/pf_op_test') ? null : `unknown program ${command}`
  return otherTools.includes(command) ? null : `unknown command ${command}`
}

test('every shell line in the documentation is a command that this checkout has', () => {
  const wrong = blocks()
    .filter(({ language }) => language === 'bash' || language === 'sh')
    .flatMap(({ where, code }) =>
      code
        .replace(/\\\n\s*/g, ' ')
        .split('\n')
        .map((line) => line.replace(/(^|\s)#.*$/, ''))
        .filter((line) => line.trim() !== '')
        .map((line) => [complaint(line), where] as const),
    )
    .filter(([problem]) => problem !== null)
  expect(wrong).toEqual([])
})

test('the two commands of the README set themselves up', () => {
  expect(scripts.test).toBe('node scripts/test.mjs')
  expect(scripts.demo).toBe('node scripts/demo.mjs')
  for (const script of ['test', 'demo']) {
    expect(readFileSync(join(root, `scripts/${script}.mjs`), 'utf8')).toMatch(/\n {2}ready\(/)
  }
})
