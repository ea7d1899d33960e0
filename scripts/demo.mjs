// npm run demo: sets the checkout up, then generates the three demo clips.
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { ready, root } from './ready.mjs'
import { main } from './toolchain.mjs'

await main(() => {
  ready()
  const demo = join(root, 'dist/examples/shapes/demo.js')
  const { status } = spawnSync(process.execPath, [demo, ...process.argv.slice(2)], {
    cwd: root,
    stdio: 'inherit',
  })
  process.exitCode = status ?? 1
})
