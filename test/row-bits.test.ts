import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'

// Every row of x·wᵀ for every number of rows, against the same row among 301: how a text is batched, or a video cut into
// pieces, must not show in its bits.
const SCRIPT = `
const { linear, packWeight } = await import('./dist/lib/ops/matmul.js')
const { slice } = await import('./dist/lib/ops/copy.js')
const { Generator } = await import('./dist/lib/tensor/generator.js')
const generator = new Generator(1)
const differing = []
for (const [k, n] of [[33, 50], [64, 64], [160, 640], [640, 160]])
  for (const packed of [false, true]) {
    const [x, w] = [generator.normal([301, k]), generator.normal([n, k])]
    if (packed) packWeight(w)
    const all = await linear(x, w).read()
    for (let m = 1; m < 110; m++) {
      const rows = await linear(slice(x, 0, 0, m), w).read()
      if (rows.some((value, i) => value !== all[i])) differing.push([k, n, packed, m].join(' '))
    }
  }
console.log(JSON.stringify(differing))
`

// Levels whose products are oneDNN's f32 ones; every CPU that has more has these, too.
test.each(['base', 'avx2'])(
  'rows of a product do not depend on their number: %s',
  async (level) => {
    const env = { ...process.env, PYRAFLOW_BACKEND: level }
    const ran = promisify(execFile)(process.execPath, ['--input-type=module', '-e', SCRIPT], { env })
    expect(JSON.parse((await ran).stdout)).toEqual([])
  },
  60_000,
)
