// npm's install step: nothing when a prebuilt or earlier addon loads, else a build from the sources.
import { dirname } from 'node:path'
import { fileURLToPath } from 'node:url'
import { buildNative } from './build-native.mjs'
import { main, works } from './toolchain.mjs'

const root = dirname(dirname(fileURLToPath(import.meta.url)))

// In a child, because an addon built for another machine may end the process that loads it.
const loads = () => works(process.execPath, '-e', `require('node-gyp-build')(${JSON.stringify(root)})`)

await main(() => {
  if (loads()) return
  console.error('pyraflow: no prebuilt addon for this machine, building it from source (some minutes)')
  buildNative()
})
