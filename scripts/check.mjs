// npm run check: types, lint and format of TypeScript, format of C++. Every part runs; one failure fails all.
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { root } from './ready.mjs'

const tool = (name) => join(root, 'node_modules/.bin', name)
const parts = [
  ['generated op table', process.execPath, ['scripts/gen-ops.mjs', '--check']],
  ['types', tool('tsc'), ['-p', 'tsconfig.check.json', '--noEmit']],
  ['TypeScript lint and format', tool('biome'), ['ci', '--error-on-warnings']],
  ['native format', process.execPath, ['scripts/check-native-format.mjs']],
]

const failed = parts.filter(([, command, args]) => {
  return spawnSync(command, args, { cwd: root, stdio: 'inherit' }).status !== 0
})
for (const [label] of failed) console.error(`check: ${label} failed`)
if (failed.length > 0) process.exitCode = 1
else console.error('check: all good')
