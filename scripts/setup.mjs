// Checks what the machine must have and installs what is missing, where it may. Safe to run again and again.
//   node scripts/setup.mjs [--dev] [--check]
import { installCommands, main, probe, Remedy, requirePlatform, run, shellLine } from './toolchain.mjs'

const dev = process.argv.includes('--dev')
const checkOnly = process.argv.includes('--check')
const say = (text) => console.error(`setup: ${text}`)
const labels = (needs) => needs.map(({ label, note }) => (note ? `${label} (${note})` : label)).join(', ')

await main(() => {
  requirePlatform()
  const needs = probe({ dev })
  const missing = needs.filter(({ found }) => !found)
  if (missing.length === 0) {
    say(`everything is here (${needs.map(({ found }) => found).join(', ')})`)
    return
  }

  const required = missing.filter(({ optional }) => !optional)
  const how = installCommands(missing)
  if (!how?.permitted || checkOnly) {
    const remedy = how
      ? `run: ${shellLine(how.commands)}`
      : 'no known package manager was found, install it by hand'
    if (required.length > 0) throw new Remedy(`setup: missing ${labels(missing)}; ${remedy}`)
    say(`not installed but optional: ${labels(missing)}; ${remedy}`)
    return
  }

  say(`missing ${labels(missing)}; installing with ${how.manager}`)
  for (const command of how.commands) {
    say(shellLine([command]))
    const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' }
    const result = run(command[0], command.slice(1), { env })
    // A package index that does not refresh is no failure yet: the packages may be known already.
    if (result.status !== 0 && !command.includes('update')) {
      say((result.stderr || result.stdout).trim().split('\n').at(-1))
    }
  }

  const still = probe({ dev }).filter(({ found }) => !found)
  const blocking = still.filter(({ optional }) => !optional)
  if (blocking.length > 0) {
    throw new Remedy(`setup: still missing ${labels(blocking)} after: ${shellLine(how.commands)}`)
  }
  say(still.length > 0 ? `done, without the optional ${labels(still)}` : 'done')
})
