// Brings a fresh checkout to the point where tests and demo run: tools, packages, native code, TypeScript.
// Plain Node until the packages are there.
import { spawnSync } from 'node:child_process'
import { existsSync, statSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Remedy } from './toolchain.mjs'

export const root = dirname(dirname(fileURLToPath(import.meta.url)))

// Runs a step with its output on stderr; a failure becomes one sentence naming the step.
export function step(label, command, args, options = {}) {
  const started = Date.now()
  const { status } = spawnSync(command, args, { cwd: root, stdio: ['ignore', 2, 2], ...options })
  if (status !== 0) throw new Remedy(`Failed: ${label} (${command} ${args.join(' ')})`)
  console.error(`${label}: ok, ${((Date.now() - started) / 1000).toFixed(1)} s`)
}

function packagesAreCurrent() {
  const installed = join(root, 'node_modules/.package-lock.json')
  return (
    existsSync(installed) && statSync(installed).mtimeMs >= statSync(join(root, 'package-lock.json')).mtimeMs
  )
}

export function ready({ dev = false, tests = false } = {}) {
  step('setup', process.execPath, ['scripts/setup.mjs', ...(dev ? ['--dev'] : [])])
  // Without scripts: the native code is built right below, where its messages can be read.
  if (!packagesAreCurrent()) step('packages', 'npm', ['ci', '--ignore-scripts', '--include=dev'])
  step('native build', process.execPath, ['scripts/build-native.mjs', ...(tests ? ['--tests'] : [])])
  step('TypeScript build', 'npm', ['run', '--silent', 'build:ts'])
}
