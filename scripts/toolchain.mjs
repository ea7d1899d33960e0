// What a native build needs, how to see whether it is there, and which command brings it. Plain Node: it runs
// before node_modules exists.
import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

// A problem that has a remedy: shown as one sentence, without a stack.
export class Remedy extends Error {}

export const run = (command, args, options = {}) => spawnSync(command, args, { encoding: 'utf8', ...options })

export const works = (command, ...args) => run(command, args).status === 0

function firstLine(command, ...args) {
  const result = run(command, args)
  return result.status === 0 ? result.stdout.split('\n')[0].trim() : null
}

const compiler = () =>
  (process.env.CXX ? [process.env.CXX] : ['c++', 'g++', 'clang++']).find((name) =>
    works(name, '--version'),
  ) ?? null

function compilerVersion(name) {
  const { stdout } = run(name, ['-E', '-P', '-x', 'c++', '-'], { input: '__clang_major__ __GNUC__\n' })
  const [clang, gcc] = (stdout ?? '').trim().split(/\s+/).map(Number)
  return clang ? { kind: 'clang', major: clang, least: 15 } : { kind: 'g++', major: gcc, least: 12 }
}

// Compiled and linked rather than searched for, so that CPATH, LIBRARY_PATH and cross prefixes count.
function linksOneDnn(name) {
  const folder = mkdtempSync(join(tmpdir(), 'pyraflow-'))
  const source = '#include <dnnl.hpp>\nint main() { return dnnl_version() == nullptr; }\n'
  const args = ['-x', 'c++', '-std=c++17', '-', '-o', join(folder, 'probe'), '-ldnnl']
  const result = run(name, args, { input: source })
  rmSync(folder, { recursive: true, force: true })
  return result.status === 0
}

export function clangFormat() {
  return (
    ['clang-format-14', 'clang-format'].find((name) =>
      / version 14\./.test(firstLine(name, '--version') ?? ''),
    ) ?? null
  )
}

// Each need: what it is called, whether a build can do without, and what was found (null: missing).
export function probe({ dev = false } = {}) {
  const cxx = compiler()
  const version = cxx && compilerVersion(cxx)
  const cmake = firstLine('cmake', '--version')?.match(/(\d+)\.(\d+)\S*/)
  const needs = [
    {
      id: 'compiler',
      label: 'a C++20 compiler (g++ 12 or clang 15, or newer)',
      found: version && version.major >= version.least ? `${version.kind} ${version.major}` : null,
      note: version ? `${cxx} is ${version.kind} ${version.major}; set CXX to a newer one` : null,
    },
    {
      id: 'cmake',
      label: 'cmake 3.20 or newer',
      found: cmake && (cmake[1] > 3 || (cmake[1] === '3' && cmake[2] >= 20)) ? `cmake ${cmake[0]}` : null,
    },
    {
      id: 'make',
      label: 'make or ninja',
      found: works('make', '--version') ? 'make' : works('ninja', '--version') ? 'ninja' : null,
    },
    {
      id: 'onednn',
      label: 'oneDNN with headers (dnnl.hpp)',
      found: cxx && linksOneDnn(cxx) ? 'oneDNN' : null,
    },
    {
      id: 'ffmpeg',
      label: 'ffmpeg (reads clips, writes mp4)',
      optional: true,
      found: firstLine('ffmpeg', '-version')?.match(/^ffmpeg version \S+/)?.[0] ?? null,
    },
  ]
  if (dev) needs.push({ id: 'clangFormat', label: 'clang-format 14', optional: true, found: clangFormat() })
  return needs
}

const managers = [
  {
    name: 'apt-get',
    before: ['apt-get', 'update'],
    install: ['apt-get', 'install', '-y', '--no-install-recommends'],
    packages: {
      compiler: 'g++',
      onednn: 'libdnnl-dev',
      clangFormat: 'clang-format-14',
    },
  },
  {
    name: 'dnf',
    install: ['dnf', 'install', '-y'],
    packages: {
      compiler: 'gcc-c++',
      onednn: 'onednn-devel',
      ffmpeg: 'ffmpeg-free',
      clangFormat: 'clang-tools-extra',
    },
  },
  {
    name: 'pacman',
    install: ['pacman', '-Sy', '--needed', '--noconfirm'],
    packages: { compiler: 'gcc', onednn: 'onednn', clangFormat: 'clang' },
  },
  {
    name: 'apk',
    install: ['apk', 'add'],
    packages: { compiler: 'g++', onednn: 'onednn-dev', clangFormat: 'clang14-extra-tools' },
  },
  {
    name: 'brew',
    unprivileged: true,
    install: ['brew', 'install'],
    packages: { compiler: 'gcc', onednn: 'onednn', clangFormat: 'clang-format@14' },
  },
]

// The commands that install these needs here, as argument lists; null without a known package manager.
export function installCommands(needs) {
  const manager = managers.find(({ name }) => works(name, '--version'))
  if (!manager) return null
  const root = process.getuid?.() === 0 || manager.unprivileged
  const packages = needs.map(({ id }) => manager.packages[id] ?? id)
  const commands = [manager.before, [...manager.install, ...packages]].filter(Boolean)
  return {
    manager: manager.name,
    permitted: root || works('sudo', '-n', 'true'),
    commands: root ? commands : commands.map((command) => ['sudo', ...command]),
  }
}

export const shellLine = (commands) => commands.map((command) => command.join(' ')).join(' && ')

export function requirePlatform() {
  if (process.platform === 'linux' && ['x64', 'arm64'].includes(process.arch)) return
  throw new Remedy(
    `pyraflow runs on Linux x64 and arm64, not on ${process.platform} ${process.arch}: use a Linux container.`,
  )
}

// Throws one sentence with the exact command when the native build cannot work.
export function requireToolchain() {
  requirePlatform()
  const missing = probe().filter((need) => !need.optional && !need.found)
  if (missing.length === 0) return
  const how = installCommands(missing)
  const what = missing.map(({ label, note }) => (note ? `${label} (${note})` : label)).join(', ')
  throw new Remedy(
    `pyraflow cannot build its native addon, missing: ${what}; ` +
      (how
        ? `run: ${shellLine(how.commands)}`
        : 'install it with your package manager and run npm run setup.'),
  )
}

// Runs a script's main function; a Remedy ends the process with its one sentence.
export async function main(body) {
  try {
    await body()
  } catch (error) {
    if (!(error instanceof Remedy)) throw error
    console.error(error.message)
    process.exitCode = 1
  }
}
