import { engine } from '../lib/engine/engine.ts'
import { adamwStep } from '../lib/ops/adamw.ts'
import { conv3d } from '../lib/ops/conv3d.ts'
import { groupNorm } from '../lib/ops/group-norm.ts'
import { Generator } from '../lib/tensor/generator.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import { countFor, type Effort, engineSeconds, onGpu, type Unnamed } from './harness.ts'
import { fastest, type TorchOp, torchOps } from './torch.ts'

/** Convolution, group norm and AdamW against PyTorch's on the same device; the fastest of its ways counts. */
export async function againstTorchOps(effort: Effort): Promise<Unnamed[]> {
  const problems = problemsOf(effort)
  const { threads } = engine.device
  const device = onGpu() ? 'cuda' : 'cpu'
  const found = torchOps(problems, { device, threads, seconds: effort.seconds })
  if (typeof found === 'string') {
    process.stderr.write(`  PyTorch is left out: ${found}\n`)
    return []
  }
  const rows: Unnamed[] = []
  for (const [i, problem] of problems.entries()) {
    const best = fastest(found.answer[i])
    if (!best) continue
    const { name, op, owned } = ours(problem)
    const seconds = await engineSeconds(op, effort.quick ? 1 : await countFor(op, effort.seconds))
    for (const t of owned) t.dispose()
    const against = `PyTorch ${found.version}, ${best[0]}`
    rows.push({ name, value: seconds * 1e3, unit: 'ms', ratio: best[1] / seconds, against })
  }
  return rows
}

function problemsOf({ quick }: Effort): TorchOp[] {
  // The decoder's, of a 384p clip.
  const clips = quick
    ? [{ channels: 32, frames: 2, height: 8, width: 8 }]
    : [
        { channels: 512, frames: 3, height: 48, width: 80 },
        { channels: 128, frames: 2, height: 192, width: 320 },
      ]
  const norm = quick ? { images: 1, pixels: 64, channels: 64 } : { images: 4, pixels: 32_768, channels: 128 }
  const both = ['f32', 'bf16'] as const
  return [
    ...clips.flatMap((clip) => both.map((dtype) => ({ op: 'conv3d' as const, dtype, ...clip }))),
    ...both.map((dtype) => ({ op: 'group_norm' as const, dtype, ...norm })),
    { op: 'adamw', count: quick ? 1024 : 16_000_000 },
  ]
}

function ours(problem: TorchOp): { name: string; op: () => Tensor; owned: Tensor[] } {
  const g = new Generator(1)
  if (problem.op === 'conv3d') {
    const { dtype, channels, frames, height, width } = problem
    const x = g.normal([1, frames, height, width, channels], { dtype })
    const w = g.normal([channels, channels, 3, 3, 3], { dtype, std: 0.02 })
    const b = g.normal([channels], { dtype })
    return {
      name: `causal 3×3×3 convolution, ${channels} channels, ${frames}×${height}×${width}, ${dtype}`,
      op: () => conv3d(x, w, b, { pad: [2, 1, 1] }),
      owned: [x, w, b],
    }
  }
  if (problem.op === 'group_norm') {
    const { dtype, images, pixels, channels } = problem
    const x = g.normal([images, pixels, channels], { dtype })
    const [w, b] = [g.normal([channels], { dtype }), g.normal([channels], { dtype })]
    return {
      name: `groupNorm + SiLU [${images}, ${pixels}, ${channels}], ${dtype}`,
      op: () => groupNorm(x, w, b, { groups: 32, silu: true }),
      owned: [x, w, b],
    }
  }
  const shape = [problem.count]
  const [grad, param, m, v] = [g.normal(shape), g.normal(shape), g.normal(shape), g.uniform(shape)]
  const step = { grad, param, m, v, lr: 1e-6, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 1e-4 }
  return {
    name: `adamw, ${problem.count / 1e6} M parameters, f32`,
    op: () => {
      adamwStep({ ...step, shadow: null, biasCorrection1: 0.5, biasCorrection2: 0.5 })
      return Tensor.empty([1])
    },
    owned: [grad, param, m, v],
  }
}
