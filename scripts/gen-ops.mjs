// Writes lib/engine/ops.gen.ts from native/ops.def: TypeScript calls ops by the numbers C++ gives them.
//   node scripts/gen-ops.mjs [--check]
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const target = join(root, 'lib/engine/ops.gen.ts')
const width = 110

export function readOps() {
  const text = readFileSync(join(root, 'native/ops.def'), 'utf8')
  const ops = [...text.matchAll(/^PF_OP\((\w+), (\w+), (\d+), (\d+), "([\w,]*)"\)$/gm)]
  const lines = text.split('\n').filter((line) => line.startsWith('PF_OP('))
  if (ops.length !== lines.length) throw new Error('native/ops.def: a PF_OP line has an unexpected form')
  return ops.map(([, folder, name, inputs, outputs, scalars], id) => {
    return { folder, name, id, inputs, outputs, scalars: scalars ? scalars.split(',') : [] }
  })
}

function entry({ name, id, inputs, outputs, scalars }) {
  const list = `[${scalars.map((scalar) => `'${scalar}'`).join(', ')}]`
  const line = `  ${name}: { id: ${id}, inputs: ${inputs}, outputs: ${outputs}, scalars: ${list} },`
  if (line.length <= width) return line
  const fields = [`id: ${id}`, `inputs: ${inputs}`, `outputs: ${outputs}`, `scalars: ${list}`]
  return `  ${name}: {\n${fields.map((field) => `    ${field},\n`).join('')}  },`
}

export function opsSource() {
  return [
    '// Generated from native/ops.def by scripts/gen-ops.mjs. Do not edit.',
    '',
    '/** Every native op: its number, the most inputs and outputs it takes, and its scalars in order. */',
    'export const OPS = {',
    ...readOps().map(entry),
    '} as const',
    '',
    '/** Name of a native op. */',
    'export type OpName = keyof typeof OPS',
    '',
  ].join('\n')
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const current = existsSync(target) ? readFileSync(target, 'utf8') : null
  const source = opsSource()
  if (current !== source) {
    if (process.argv.includes('--check')) {
      console.error('lib/engine/ops.gen.ts is not what native/ops.def gives; run: node scripts/gen-ops.mjs')
      process.exitCode = 1
    } else {
      mkdirSync(dirname(target), { recursive: true })
      writeFileSync(target, source)
    }
  }
}
