import { execFile } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { type DType, engine } from '../lib/engine/engine.ts'
import { type Layout, makeLayout } from '../lib/pyramid/layout.ts'
import { columnOf, HEAD_DIM, type Problem, STAGES, TEXT, withMask, withOp } from './attention-problem.ts'
import { againstTorch } from './attention-torch.ts'
import {
  bareMatmul,
  bareMultiplyAdd,
  countFor,
  type Effort,
  engineSeconds,
  fastBf16,
  interleave,
  median,
  onGpu,
  productDtype,
  productLibrary,
  type Required,
  type Unnamed,
} from './harness.ts'
import { findOnnxRuntime, INSTALL, onnxAttention } from './peers.ts'

// The published heads. Fewer of them do the same work per FLOP where a whole call would take minutes.
const HEADS = 30
const DTYPES = ['bf16', 'f32'] as const

/** Attention against the rate of a matrix product, the bare arithmetic, another library, and its own dense self. */
export async function attention(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  for (const part of [ceilings, dense, capped, againstTorch, training, histories, memory])
    rows.push(...(await part(effort)))
  return rows
}

/** Few slices suffice: they are long, and a matrix product stands beside each. */
const shortened = (effort: Effort): Effort => ({
  ...effort,
  rounds: effort.quick ? 1 : Math.min(5, effort.rounds),
})

/** The library's rate on the square projection of the published width. */
const product = (effort: Effort, dtype: DType): Promise<number> =>
  bareMatmul(2048, effort.quick ? 256 : 1920, 1920, dtype, effort.seconds)

async function measure(
  effort: Effort,
  name: string,
  problem: Problem,
  required?: Required,
): Promise<Unnamed> {
  return await withOp(problem, async (op, flops) => {
    const count = effort.quick ? 1 : await countFor(op, effort.seconds)
    const theirs = await productDtype(problem.dtype)
    const { ours, ratio } = await interleave(
      shortened(effort),
      async () => (1e-9 * flops) / (await engineSeconds(op, count)),
      () => product(effort, theirs),
    )
    const against = `${productLibrary()} matrix product, ${theirs}`
    return { name, value: ours, unit: 'GFLOP/s', ratio, against, ...(required && { required }) }
  })
}

async function ceilings(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  for (const dtype of DTYPES) {
    const bare = await bareMultiplyAdd(dtype, effort.seconds)
    if (bare === undefined) continue
    const value = await product(effort, dtype)
    const against = `${dtype === 'bf16' ? 'bf16 dot products' : 'multiply-adds'} out of registers`
    const name = `${productLibrary()} matrix product 2048×1920×1920, ${dtype}`
    rows.push({ name, value, unit: 'GFLOP/s', ratio: value / bare, against })
  }
  return rows
}

async function dense(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  for (const length of effort.quick ? [256] : [256, 1088, 4096, 15_488]) {
    for (const dtype of DTYPES) {
      const heads = effort.quick ? 2 : length > 5000 && dtype === 'f32' ? 4 : HEADS
      const required = { of: 'ratio', atLeast: 0.6 } as const
      const bound = dtype === 'bf16' && length === 4096 && fastBf16() ? required : undefined
      const label = `${length} tokens, ${heads} heads, ${dtype}`
      rows.push(await measure(effort, `dense, ${label}`, { dtype, heads, length, pairs: length ** 2 }, bound))
    }
  }
  return [...rows, ...(await againstPeer(effort))]
}

/** The level below AVX-512 against the one in use: in a process of its own, for a process has one level. */
async function capped(effort: Effort): Promise<Unnamed[]> {
  if (!hasAvx512()) return []
  const problem = {
    dtype: 'f32',
    heads: effort.quick ? 2 : HEADS,
    length: effort.quick ? 256 : 1088,
  } as const
  const { length, heads } = problem
  const file = fileURLToPath(import.meta.url).replace(/attention(\.\w+)$/, 'attention-rate$1')
  const env = { ...process.env, PYRAFLOW_BACKEND: 'cpu_avx2', PYRAFLOW_THREADS: `${engine.device.threads}` }
  const rates: [number, number][] = []
  await withOp({ ...problem, pairs: length ** 2 }, async (op, flops) => {
    const count = effort.quick ? 1 : await countFor(op, effort.seconds)
    for (let i = 0; i < (effort.quick ? 1 : 3); i++) {
      const ours = (1e-9 * flops) / (await engineSeconds(op, count))
      const child = promisify(execFile)(process.execPath, [file, `${length}`, `${heads}`, `${count}`], {
        env,
      })
      rates.push([ours, Number((await child).stdout)])
    }
  })
  return [
    {
      name: `dense, ${length} tokens, ${heads} heads, f32, capped at AVX2`,
      value: median(rates.map(([, theirs]) => theirs)),
      unit: 'GFLOP/s',
      ratio: median(rates.map(([ours, theirs]) => theirs / ours)),
      against: engine.device.backend,
      required: { of: 'ratio', atLeast: 0.5 },
    },
  ]
}

async function againstPeer(effort: Effort): Promise<Unnamed[]> {
  if (onGpu()) {
    process.stderr.write('  no comparison with onnxruntime, which is a peer of the CPU levels\n')
    return []
  }
  const ort = findOnnxRuntime()
  if (!ort) {
    process.stderr.write(`  no comparison with onnxruntime, which is not installed: ${INSTALL}\n`)
    return []
  }
  const rows: Unnamed[] = []
  const heads = effort.quick ? 2 : HEADS
  for (const length of effort.quick ? [256] : [256, 512, 1088, 4096]) {
    const peer = await onnxAttention(ort, length, heads, HEAD_DIM)
    for (const dtype of DTYPES) {
      const row = await withOp({ dtype, heads, length, pairs: length ** 2 }, async (op, flops) => {
        const count = effort.quick ? 1 : await countFor(op, effort.seconds)
        const times: [number, number][] = []
        for (let i = 0; i < shortened(effort).rounds; i++) {
          // By turns and never together: both would use every core.
          const ours = await engineSeconds(op, count)
          await engine.idle()
          times.push([ours, await peer.seconds(Math.max(1, count >> 1))])
        }
        const ratio = median(times.map(([ours, theirs]) => theirs / ours))
        const value = (1e-9 * flops) / median(times.map(([ours]) => ours))
        const name = `dense, ${length} tokens, ${heads} heads, ${dtype}, by the peer`
        return { name, value, unit: 'GFLOP/s', ratio, against: peer.name }
      })
      const required = peerBound(dtype, length)
      rows.push(required ? { ...row, required } : row)
    }
    await peer.close()
  }
  return rows
}

function peerBound(dtype: DType, length: number): Required | undefined {
  if (dtype === 'f32') return length >= 1088 && hasAvx512() ? { of: 'ratio', atLeast: 1.3 } : undefined
  return length <= 512 && fastBf16() ? { of: 'ratio', atLeast: 1.5 } : undefined
}

const hasAvx512 = (): boolean => /avx512|amx/.test(engine.device.backend)

async function training(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  const heads = effort.quick ? 2 : HEADS
  await withMask(trainingLayout(), async (mask, length, pairs) => {
    const share = ((100 * pairs) / length ** 2).toFixed(0)
    for (const dtype of DTYPES) {
      const name = `packed training batch, ${length} tokens, ${share} % visible, ${dtype}`
      rows.push(await measure(effort, name, { dtype, heads, length, pairs, mask }))
      const back = { dtype, heads, length, pairs, mask, pass: 'backward' } as const
      rows.push(await measure(effort, `${name}, backward`, back, backwardBound(dtype)))
    }
  })
  for (const length of effort.quick ? [256] : [1088, 4096]) {
    for (const dtype of DTYPES) {
      const name = `dense, ${length} tokens, ${dtype}, backward`
      const problem = { dtype, heads, length, pairs: length ** 2, pass: 'backward' } as const
      rows.push(await measure(effort, name, problem, backwardBound(dtype)))
    }
  }
  return rows
}

function backwardBound(dtype: DType): Required | undefined {
  if (dtype === 'bf16' && !fastBf16()) return undefined
  return { of: 'ratio', atLeast: dtype === 'bf16' ? 0.45 : 0.6 }
}

/** Time of real history layouts over that of the dense call of the same length, times their visible fraction. */
async function histories(effort: Effort): Promise<Unnamed[]> {
  const rows: Unnamed[] = []
  const heads = effort.quick ? 1 : 4
  const sizes: [string, number, number][] = effort.quick
    ? [['384p', 48, 80]]
    : [
        ['384p', 48, 80],
        ['768p', 96, 160],
      ]
  for (const [label, height, width] of sizes) {
    for (const unit of effort.quick ? [3] : [0, 3, 15, 30]) {
      for (let stage = effort.quick ? 2 : 0; stage < STAGES; stage++) {
        const layout = makeLayout({
          columns: [columnOf(unit, stage, height, width)],
          batch: 1,
          textLength: TEXT,
          headAxes: [16, 24, 24],
          causal: true,
        })
        await withMask(layout, async (mask, length, pairs) => {
          const problem = { dtype: 'bf16', heads, length, pairs } as const
          const visible = pairs / length ** 2
          const pairsOfTimes = await withOp({ ...problem, mask }, (masked) =>
            withOp(problem, async (whole) => {
              const once = await engineSeconds(whole, 1)
              const count = effort.quick ? 1 : Math.max(1, Math.round(effort.seconds / 4 / once))
              const times: number[] = []
              for (let i = 0; i < (effort.quick ? 1 : 3); i++) {
                const ours = await engineSeconds(masked, count)
                times.push(ours / (visible * (await engineSeconds(whole, count))))
              }
              return times
            }),
          )
          const name = `${label} unit ${unit} stage ${stage}: ${length} tokens, ${(100 * visible).toFixed(0)} % visible`
          rows.push({
            name,
            value: median(pairsOfTimes),
            unit: '× dense time × visible',
            ...(length >= 4096 && { required: { of: 'value', atMost: 1.15 } as const }),
          })
        })
      }
    }
  }
  return rows
}

/** Bytes beyond operands and results at the longest sequence of the published models. */
async function memory(effort: Effort): Promise<Unnamed[]> {
  const length = effort.quick ? 512 : 15_488
  const bytes = await withOp({ dtype: 'bf16', heads: HEADS, length, pairs: 1 }, async (op) => {
    await engine.idle()
    const before = engine.memory().live
    engine.resetPeak()
    const o = op()
    await engine.idle()
    const extra = engine.memory().peak - before - o.bytes
    o.dispose()
    return extra
  })
  return [
    {
      name: `memory beside operands and result, ${length} tokens, ${HEADS} heads, bf16, ${engine.device.threads} threads`,
      value: bytes / 2 ** 20,
      unit: 'MiB',
      required: { of: 'value', atMost: 64 },
    },
  ]
}

/** One 384p sample a column at stages 0, 1, 1 and 2, with the history lengths of a four-unit clip. */
function trainingLayout(): Layout {
  const columns = [0, 1, 1, 2].map((stage) => columnOf(stage === STAGES - 1 ? 1 : 2, stage, 48, 80))
  return makeLayout({ columns, batch: 1, textLength: TEXT, headAxes: [16, 24, 24], causal: true })
}
