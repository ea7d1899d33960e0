import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const read = (path: string) => readFileSync(join(root, path), 'utf8')

function filesUnder(folder: string, pattern: RegExp): string[] {
  const names = existsSync(join(root, folder)) ? readdirSync(join(root, folder), { recursive: true }) : []
  return names.map((name) => `${folder}/${name}`).filter((name) => pattern.test(name))
}

test('the TypeScript op table is what native/ops.def gives', async () => {
  const generator: { opsSource(): string } = await import(join(root, 'scripts/gen-ops.mjs'))
  expect(read('lib/engine/ops.gen.ts')).toBe(generator.opsSource())
})

test('every op folder has its contract, reference, cpu and case files', async () => {
  const generator: { readOps(): { folder: string }[] } = await import(join(root, 'scripts/gen-ops.mjs'))
  const folders = [...new Set(generator.readOps().map(({ folder }) => folder))]
  const expected = folders.flatMap((folder) =>
    ['.h', '_ref.cc', '_cpu.cc', '_test.cc'].map((end) => `native/ops/${folder}/${folder}${end}`),
  )
  expect(expected.filter((path) => !existsSync(join(root, path)))).toEqual([])
})

// Who may import whom. A folder may always import itself; `*` stands for everything but the command line.
const numbers = ['engine/errors']
const tensors = ['engine', 'tensor']
const networks = [...tensors, 'ops', 'nn', 'io']
const allowed: Record<string, string[]> = {
  engine: [],
  tensor: ['engine'],
  ops: tensors,
  io: [...tensors, 'ops'],
  nn: [...tensors, 'ops', 'io'],
  // forward() makes the token layout itself when the caller brings none, and the order of kept keys.
  models: [...networks, 'pyramid/layout', 'pyramid/current'],
  text: [...networks, 'models'],
  flow: [...tensors, 'ops'],
  pyramid: numbers,
  'pyramid/latents': [...tensors, 'ops'],
  generate: ['*', '!train'],
  sample: ['*', '!train', '!generate', '!pipeline'],
  lora: ['*', '!generate', '!pipeline', '!train'],
  train: ['*', '!generate', '!pipeline'],
  golden: ['*'],
  cli: ['*', 'cli'],
}
// Files directly under lib (index, generate, pipeline, …) are the generation side.
const generation = ['*', '!train']

function rulesFor(file: string): string[] {
  const stem = file.replace(/\.ts$/, '')
  const folder = stem.includes('/') ? stem.split('/')[0]! : null
  if (folder === null) return stem === 'index' ? ['*'] : generation
  return allowed[stem] ?? allowed[folder] ?? []
}

function mayImport(file: string, imported: string): boolean {
  const [from, to] = [file, imported].map((path) => (path.includes('/') ? path.split('/')[0]! : null))
  if (from !== null && from === to) return true
  const rules = rulesFor(file)
  const matches = (rule: string) => imported === `${rule}.ts` || imported.startsWith(`${rule}/`)
  if (rules.some((rule) => rule.startsWith('!') && matches(rule.slice(1)))) return false
  if (rules.includes('*')) return to !== 'cli'
  return rules.some(matches)
}

test('folders of lib import only what lies below them', () => {
  const wrong: string[] = []
  for (const path of filesUnder('lib', /\.ts$/)) {
    const file = relative('lib', path)
    // Static, type-only, re-exporting and dynamic imports alike; only relative ones stay inside lib.
    for (const [, target] of read(path).matchAll(/(?:\bfrom|\bimport)\s*\(?\s*'(\.{1,2}\/[^']+)'/g)) {
      const imported = join(dirname(file), target!)
      if (!mayImport(file, imported)) wrong.push(`${file} imports ${imported}`)
    }
  }
  expect(wrong).toEqual([])
})

test('only the addon folder includes napi.h, and only one file includes oneDNN', () => {
  const including = (header: RegExp) =>
    filesUnder('native', /\.(h|cc|cu)$/).filter((path) => header.test(read(path)))
  expect(including(/#include\s*[<"]napi\.h/).filter((path) => !path.startsWith('native/addon/'))).toEqual([])
  // The kernels' door to oneDNN, and the bare loop that the bench compares it with.
  const doors = ['native/backends/cpu/bench.cc', 'native/backends/cpu/onednn.cc']
  expect(including(/#include\s*[<"](oneapi\/dnnl\/)?dnnl/).filter((path) => !doors.includes(path))).toEqual(
    [],
  )
})

test('no source file is longer than 700 lines', () => {
  const files = [...filesUnder('lib', /\.ts$/), ...filesUnder('native', /\.(h|cc|cu|cuh)$/)]
  expect(files.filter((path) => read(path).split('\n').length > 701)).toEqual([])
})

test('package-lock.json pins every package by hash and names no host to fetch from', () => {
  const lock: { packages: Record<string, { resolved?: string; integrity?: string; link?: boolean }> } =
    JSON.parse(read('package-lock.json'))
  const packages = Object.entries(lock.packages).filter(([path]) => path !== '')
  expect(packages.filter(([, { resolved }]) => resolved !== undefined)).toEqual([])
  expect(packages.filter(([, { integrity }]) => !integrity).map(([path]) => path)).toEqual([])
})
