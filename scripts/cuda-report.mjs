// Reads what ptxas said of every kernel of the last CUDA build: registers, shared memory, spills.
//   node scripts/cuda-report.mjs [--table FILE]      tab-separated, as bench/results/cuda-kernels.tsv
// Exits with 1 when an attention kernel spills more than a few registers: those loops have no time for local memory; and
// when ptxas makes a kernel's asynchronous products wait for one another.
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { nativeTree } from './build-native.mjs'
import { main, Remedy, run } from './toolchain.mjs'

/** Bytes that an attention kernel may keep in local memory. */
const MOST_SPILLED = 96

/** The kernels in one report of `nvcc -Xptxas=-v`. */
export function kernelsIn(text, file) {
  const kernels = []
  for (const line of text.split('\n')) {
    const entry = /Compiling entry function '(\S+)' for 'sm_(\w+)'/.exec(line)
    if (entry) kernels.push({ file, kernel: entry[1], arch: entry[2], registers: 0, shared: 0, spill: 0 })
    const last = kernels.at(-1)
    if (!last) continue
    const spill = /(\d+) bytes spill stores/.exec(line)
    if (spill) last.spill = Number(spill[1])
    const used = /Used (\d+) registers/.exec(line)
    if (used) last.registers = Number(used[1])
    const shared = /(\d+) bytes smem/.exec(line)
    if (shared) last.shared = Number(shared[1])
  }
  return kernels
}

/** Whether ptxas makes wgmma products wait for one another, or leaves warps the registers that they began with. */
export const serialized = (text) =>
  /wgmma\.mma_async instructions are serialized|'setmaxnreg' ignored/.test(text)

function demangled(kernels) {
  const { status, stdout } = run('c++filt', ['-p', ...kernels.map(({ kernel }) => kernel)])
  const names = status === 0 ? stdout.trim().split('\n') : []
  return kernels.map((k, i) => ({
    ...k,
    kernel: (names[i] ?? k.kernel).replaceAll('(anonymous namespace)::', ''),
  }))
}

function tableOf(kernels) {
  const columns = ['file', 'kernel', 'arch', 'registers', 'shared', 'spill']
  return [columns, ...kernels.map((k) => columns.map((c) => k[c]))]
    .map((row) => `${row.join('\t')}\n`)
    .join('')
}

await main(() => {
  const folder = join(nativeTree, 'cuda')
  if (!existsSync(folder))
    throw new Remedy('There is no CUDA build; run: node scripts/build-native.mjs --cuda')
  const reports = readdirSync(folder)
    .filter((name) => name.endsWith('.o.txt'))
    .map((name) => ({
      file: name.replace('.o.txt', ''),
      text: readFileSync(join(folder, name), 'utf8'),
    }))
  const kernels = demangled(reports.flatMap(({ file, text }) => kernelsIn(text, file)))
  const at = process.argv.indexOf('--table')
  if (at > 0) writeFileSync(process.argv[at + 1], tableOf(kernels))
  const spilling = kernels.filter(({ spill }) => spill > 0)
  for (const { file, kernel, arch, registers, spill } of spilling)
    console.error(`cuda: ${file} sm_${arch} ${kernel}: ${registers} registers, ${spill} bytes spilled`)
  const most = kernels.reduce((a, b) => (b.registers > a.registers ? b : a), { registers: 0 })
  console.error(
    `cuda: ${kernels.length} kernels, at most ${most.registers} registers (${most.kernel}), ${spilling.length} with spills`,
  )
  const waiting = reports.filter(({ text }) => serialized(text)).map(({ file }) => file)
  if (waiting.length > 0)
    throw new Remedy(
      `ptxas serializes the products of ${waiting.join(', ')}, or ignores setmaxnreg there: touch no register of theirs before the wait.`,
    )
  if (spilling.some(({ file, spill }) => file.startsWith('attention') && spill > MOST_SPILLED))
    throw new Remedy('An attention kernel spills too many registers: use smaller tiles or fewer live values.')
})
