// Configures and builds the native code with CMake: addon and backends into build/Release, everything else in
// out/native (not under build/, which node-gyp deletes).
//   node scripts/build-native.mjs [--tests] [--cuda] [--bundle]
import { existsSync, readFileSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { main, Remedy, requireToolchain, run } from './toolchain.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const resolve = createRequire(import.meta.url).resolve
export const nativeTree = join(root, 'out/native')

const includeFolder = (name, ...below) => join(dirname(resolve(`${name}/package.json`)), ...below)

// A release bundle must find the libraries beside it ($ORIGIN). libdnnl has no run path of its own, so each
// backend asks for what libdnnl needs as well, and the loader then has those before libdnnl wants them. OpenCL is a need
// of Debian's build for x64 alone.
const openCl = process.arch === 'x64' ? ' -l:libOpenCL.so.1' : ''
const dnnlNeeds = `-Wl,--no-as-needed -l:libgomp.so.1${openCl} -Wl,--as-needed`

function cmake(...args) {
  // Everything CMake says is for humans; stdout stays free for results.
  const { status } = run('cmake', args, { stdio: ['ignore', 2, 2] })
  if (status !== 0) throw new Remedy(`The native build failed in: cmake ${args.join(' ')}`)
}

// CMake refuses a tree that was configured under another path, as after copying a checkout.
function forgetMovedTree() {
  const cache = join(nativeTree, 'CMakeCache.txt')
  if (!existsSync(cache) || readFileSync(cache, 'utf8').includes(`CMAKE_HOME_DIRECTORY:INTERNAL=${root}\n`))
    return
  rmSync(nativeTree, { recursive: true, force: true })
}

export function buildNative({ tests = false, cuda = false, bundle = false } = {}) {
  requireToolchain()
  forgetMovedTree()
  cmake(
    ...['-S', root, '-B', nativeTree, '--log-level=WARNING', '-DCMAKE_BUILD_TYPE=Release'],
    `-DPF_OUT=${join(root, 'build/Release')}`,
    `-DNODE_API_HEADERS=${includeFolder('node-api-headers', 'include')}`,
    `-DNODE_ADDON_API=${includeFolder('node-addon-api')}`,
    `-DPF_TESTS=${tests ? 'ON' : 'OFF'}`,
    `-DPF_CUDA=${cuda ? 'ON' : 'OFF'}`,
    ...(process.env.PYRAFLOW_LEVELS ? [`-DPF_LEVELS=${process.env.PYRAFLOW_LEVELS}`] : []),
    `-DCMAKE_SHARED_LINKER_FLAGS=${bundle ? dnnlNeeds : ''}`,
  )
  cmake('--build', nativeTree, '-j', String(availableParallelism()))
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await main(() =>
    buildNative({
      tests: process.argv.includes('--tests'),
      cuda: process.argv.includes('--cuda') || process.env.PYRAFLOW_CUDA === '1',
      bundle: process.argv.includes('--bundle') || process.env.PYRAFLOW_BUNDLE === '1',
    }),
  )
}
