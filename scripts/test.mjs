// npm test: sets the checkout up, runs native op cases and TypeScript tests, ends with one line of counts.
//   npm test [-- vitest arguments]      with arguments only the TypeScript tests run
import { spawnSync } from 'node:child_process'
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

function nativeCases() {
  const { status, stdout } = spawnSync(join(root, 'out/native/pf_op_test'), [], {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 2],
    maxBuffer: 1 << 28,
  })
  const output = stdout ?? ''
  const last = output.match(/(\d+) passed, (\d+) failed\s*$/)
  const [passed, failed] = last ? last.slice(1).map(Number) : [0, 0]
  // One line for each instruction level that this machine lacks.
  const skipped = output.match(/^skipped .*$/gm) ?? []
  for (const line of skipped) console.error(`native op cases: ${line}`)
  // A runner that died before its last line, or that failed without a failed case, is itself one failure.
  const died = status !== 0 && failed === 0 ? 1 : 0
  console.error(status === 0 ? `native op cases: ${passed} passed` : output.split('\n').slice(-40).join('\n'))
  if (died) console.error(`native op cases: pf_op_test ended with status ${status}`)
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

await main(() => {
  const args = process.argv.slice(2)
  ready({ tests: args.length === 0 })
  if (args.length === 0) nativeCases()
  typescriptTests(args)
  console.log(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped`)
  if (counts.failed > 0) process.exitCode = 1
})
