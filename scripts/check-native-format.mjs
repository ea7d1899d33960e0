// Checks (or with --write: rewrites) the layout of all native sources with clang-format 14. Another version
// lays out differently, so any other one is refused.
import { readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { clangFormat, installCommands, main, Remedy, run, shellLine } from './toolchain.mjs'

const native = join(dirname(dirname(fileURLToPath(import.meta.url))), 'native')

await main(() => {
  const tool = clangFormat()
  if (!tool) {
    const how = installCommands([{ id: 'clangFormat' }])
    throw new Remedy(
      `clang-format 14 is missing; ${how ? `run: ${shellLine(how.commands)}` : 'install it by hand'}`,
    )
  }
  const files = readdirSync(native, { recursive: true })
    .filter((name) => /\.(h|cc|cu|cuh)$/.test(name))
    .map((name) => join(native, name))
  const mode = process.argv.includes('--write') ? ['-i'] : ['--dry-run', '-Werror']
  if (run(tool, [...mode, ...files], { stdio: 'inherit' }).status !== 0) {
    throw new Remedy('The native sources are not formatted; run: npm run format')
  }
  console.error(`native format: ${files.length} files ok`)
})
