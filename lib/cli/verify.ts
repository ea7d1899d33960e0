import { type Command, Option } from 'commander'
import type { CaseResult } from '../golden/verify.ts'
import { type CommonOptions, EXIT, finite, interruptible, paint, result, resultJson, say } from './console.ts'
import { common, configureEngine } from './settings.ts'

interface VerifyFlags extends CommonOptions {
  dtype: 'f32' | 'bf16'
  device?: string
  filter?: string
  verbose?: boolean
}

export function addVerify(program: Command): void {
  const command = program
    .command('verify')
    .description('run recorded reference cases through this engine and compare the numbers')
    .argument('<dir>', 'folder of recorded cases, each a folder with a case.json')
    .option('--device <name>', 'where to compute: auto, cpu, cuda, or a level as for --backend')
    .addOption(
      new Option('--dtype <type>', 'compute type')
        .choices(['f32', 'bf16'])
        .env('PYRAFLOW_DTYPE')
        .default('f32'),
    )
    .option('--filter <text>', 'only cases whose name contains this')
    .option('--json [file]', 'write the results as JSON to a file, or to stdout')
    .option('-v, --verbose', 'show every comparison')
  common(command, false).action(run)
}

async function run(dir: string, flags: VerifyFlags): Promise<void> {
  await configureEngine(flags)
  const { engine } = await import('../engine/engine.ts')
  const { verifyFolder } = await import('../golden/verify.ts')
  // A device that does not work is one error, not one a case.
  void engine.device
  const { signal, release } = interruptible()
  // The lines are the result, unless stdout is to hold JSON.
  const print = flags.json === true ? say : result
  const began = performance.now()
  let results: CaseResult[]
  try {
    results = await verifyFolder(dir, {
      dtype: flags.dtype,
      filter: flags.filter,
      signal,
      onCase: (c) => {
        print(line(c))
        if (flags.verbose)
          for (const check of c.checks) print(`    ${numbers(check.error, check.tolerance)}  ${check.name}`)
      },
    })
  } finally {
    release()
  }
  const count = (status: CaseResult['status']): number => results.filter((c) => c.status === status).length
  const failed = count('failed')
  const summary = {
    passed: count('passed'),
    failed,
    unsupported: count('unsupported'),
    f32Only: count('f32-only'),
    seconds: (performance.now() - began) / 1000,
  }
  say(summaryLine(summary, results))
  if (flags.json !== undefined) {
    const report = { dir, dtype: flags.dtype, device: engine.device, ...summary, cases: results }
    if (flags.json === true) resultJson(report)
    else {
      const { writeFileAtomically } = await import('../io/atomic.ts')
      await writeFileAtomically(flags.json as string, `${JSON.stringify(report, finite, 2)}\n`)
    }
  }
  // Asking for cases that are not there must not look like success.
  if (results.length === 0) say(`pyraflow: no case of ${dir} matches "${flags.filter}"`)
  if (failed > 0 || results.length === 0) process.exitCode = EXIT.failed
}

function numbers(error: number, tolerance: number): string {
  const text = (value: number): string => (value === 0 ? '0' : value.toExponential(1))
  return `${text(error).padStart(8)} ≤ ${text(tolerance).padEnd(8)}`
}

function line(c: CaseResult): string {
  const name = c.name.padEnd(28)
  if (c.status === 'unsupported')
    return `${paint('not yet', 'yellow', process.stdout)}  ${name} ${c.kind}: not supported yet`
  if (c.status === 'f32-only')
    return `${paint('f32 only', 'dim', process.stdout)} ${name} ${c.kind}: no bf16 numbers are recorded`
  const passed = c.status === 'passed'
  const mark = paint(passed ? 'ok     ' : 'FAILED ', passed ? 'green' : 'red', process.stdout)
  if (c.checks.length === 0) return `${mark}  ${name} ${c.worst}`
  const shown = numbers(c.error, c.tolerance)
  return `${mark}  ${name} ${passed ? shown : shown.replace('≤', '>')} ${c.worst} (${c.checks.length} checks)`
}

function summaryLine(
  s: { passed: number; failed: number; unsupported: number; f32Only: number; seconds: number },
  results: readonly CaseResult[],
): string {
  const kinds = [...new Set(results.filter((c) => c.status === 'unsupported').map((c) => c.kind))]
  const parts = [`${s.passed} passed`, `${s.failed} failed`]
  if (s.unsupported > 0) parts.push(`${s.unsupported} not supported yet (${kinds.join(', ')})`)
  if (s.f32Only > 0) parts.push(`${s.f32Only} f32 only`)
  return `${parts.join(', ')} in ${s.seconds.toFixed(1)} s`
}
