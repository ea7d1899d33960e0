// Makes the release bundle in prebuilds/: addon, backends and the shared libraries they need, loadable on a
// machine without oneDNN. prebuildify calls this file again with --stage, between building and packing.
import { copyFileSync, existsSync, mkdirSync, readdirSync, realpathSync, rmSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { main, Remedy, run } from './toolchain.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const release = join(root, 'build/Release')

// What may be shipped: the needs of oneDNN that a machine may lack. libc and libstdc++ stay the system's.
const shipped = ['libdnnl.so.', 'libgomp.so.1', 'libOpenCL.so.1']

function stage() {
  for (const name of readdirSync(release).filter((file) => file.endsWith('.so'))) {
    const { stdout } = run('ldd', [join(release, name)])
    for (const [, soname, path] of stdout.matchAll(/(\S+) => (\/\S+)/g)) {
      const target = join(release, soname)
      if (!shipped.some((prefix) => soname.startsWith(prefix)) || path === target) continue
      copyFileSync(realpathSync(path), target)
      stageLicence(soname, path)
    }
  }
}

// Debian keeps each package's licence text beside its documentation.
function stageLicence(soname, path) {
  const owner = run('dpkg', ['-S', realpathSync(path)]).stdout?.split(':')[0]
  const text = `/usr/share/doc/${owner}/copyright`
  if (!owner || !existsSync(text))
    throw new Remedy(`No licence text found for ${soname}: bundle on Debian or Ubuntu`)
  const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`, 'licences')
  mkdirSync(folder, { recursive: true })
  copyFileSync(text, join(folder, `${soname}.txt`))
}

function bundle() {
  rmSync(join(root, 'prebuilds'), { recursive: true, force: true })
  // A build for tests leaves a backend there that no user needs.
  rmSync(release, { recursive: true, force: true })
  const prefix = dirname(dirname(realpathSync(process.execPath)))
  const env = { ...process.env, PYRAFLOW_BUNDLE: '1' }
  // With the headers of the running Node at hand, node-gyp has no reason to download them.
  if (existsSync(join(prefix, 'include/node/node_api.h'))) env.npm_config_nodedir = prefix
  const args = ['--napi', '--tag-libc', '--strip', '--target', process.versions.node]
  const postinstall = ['--postinstall', 'node scripts/prebuild.mjs --stage']
  const tool = join(root, 'node_modules/prebuildify/bin.js')
  const { status } = run(process.execPath, [tool, ...args, ...postinstall], {
    cwd: root,
    env,
    stdio: 'inherit',
  })
  if (status !== 0) throw new Remedy('The release bundle was not made; see the messages above.')
  // The staged copies would shadow the system's libraries in developer builds.
  rmSync(release, { recursive: true, force: true })
  console.error('prebuild: done; for a developer build again, run: npm run build:native')
}

await main(() => (process.argv.includes('--stage') ? stage() : bundle()))
