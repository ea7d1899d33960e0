// npm test: sets the checkout up, runs native op cases and TypeScript tests, ends with one line of counts.
//   npm test [-- vitest arguments]      with arguments only the TypeScript tests run
import { spawn, spawnSync } from 'node:child_process'
import { mkdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { ready, root } from './ready.mjs'
import { main } from './toolchain.mjs'

const counts = { passed: 0, failed: 0, skipped: 0 }
const add = (passed, failed, skipped) => {
  counts.passed += passed
  counts.failed += failed
  counts.skipped += skipped
}

// The CPU levels, and beside them the CUDA kernels, whose emulator has one thread; attention also as on Hopper, and as on
// cards with less shared memory.
async function nativeCases() {
  await Promise.all([
    nativeCasesOf('cpu'),
    nativeCasesOf('cuda'),
    nativeCasesOf('cuda_emulated', ['--filter', 'attention'], { PYRAFLOW_HOPPER: 'require' }),
    nativeCasesOf('cuda_emulated', ['--filter', 'attention'], { PYRAFLOW_EMULATOR_SHARED: '101376' }),
  ])
}

async function nativeCasesOf(level, filter = [], settings = {}) {
  const child = spawn(join(root, 'out/native/pf_op_test'), ['--level', level, ...filter], {
    stdio: ['ignore', 'pipe', 2],
    env: { ...process.env, ...settings },
  })
  let output = ''
  child.stdout.setEncoding('utf8').on('data', (text) => {
    output += text
  })
  const status = await new Promise((resolve) => child.on('close', resolve).on('error', () => resolve(-1)))
  const last = output.match(/(\d+) passed, (\d+) failed\s*$/)
  const [passed, failed] = last ? last.slice(1).map(Number) : [0, 0]
  // One line for each instruction level or device that this machine lacks.
  const skipped = output.match(/^skipped .*$/gm) ?? []
  const name = [level, ...filter.slice(1), ...Object.keys(settings)].join(' ')
  const say = (text) => console.error(`native op cases, ${name}: ${text}`)
  for (const line of skipped) say(line)
  // A runner that died before its last line, or that failed without a failed case, is itself one failure.
  const died = status !== 0 && failed === 0 ? 1 : 0
  say(status === 0 ? `${passed} passed` : output.split('\n').slice(-40).join('\n'))
  if (died) say(`pf_op_test ended with status ${status}`)
  add(passed, failed + died, skipped.length)
}

function typescriptTests(args) {
  const report = join(root, 'out/vitest.json')
  mkdirSync(join(root, 'out'), { recursive: true })
  rmSync(report, { force: true })
  const vitest = join(root, 'node_modules/vitest/vitest.mjs')
  const reporters = ['--reporter=default', '--reporter=json', `--outputFile.json=${report}`]
  const options = { cwd: root, stdio: ['ignore', 2, 2] }
  const { status } = spawnSync(process.execPath, [vitest, 'run', ...reporters, ...args], options)
  try {
    const result = JSON.parse(readFileSync(report, 'utf8'))
    add(result.numPassedTests, result.numFailedTests, result.numPendingTests + result.numTodoTests)
    // A file that does not load has no failed test, but it is no success either.
    if (status !== 0 && result.numFailedTests === 0) add(0, Math.max(1, result.numFailedTestSuites), 0)
  } catch {
    add(0, 1, 0)
  }
}

await main(async () => {
  const args = process.argv.slice(2)
  ready({ tests: args.length === 0 })
  if (args.length === 0) await nativeCases()
  typescriptTests(args)
  console.log(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`)
  if (counts.failed > 0) process.exitCode = 1
})
