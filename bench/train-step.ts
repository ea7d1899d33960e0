import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { engine } from '../lib/engine/engine.ts'
import type { FluxConfig } from '../lib/models/flux-config.ts'
import { createVelocityNetwork } from '../lib/models/load-network.ts'
import type { Layout } from '../lib/pyramid/layout.ts'
import { Tensor } from '../lib/tensor/tensor.ts'
import type { ImmediateTextEncoder } from '../lib/text/encoder.ts'
import { Trainer } from '../lib/train/trainer.ts'
import { breakdown, type Effort, median, type Unnamed } from './harness.ts'
import { noise } from './peers.ts'
import { type TorchSequence, torchStep } from './torch.ts'
import { withRandomLatents } from './toy.ts'
import { productShare, timeSteps } from './train.ts'

/** 101 million parameters of the published form. */
const NETWORK: Partial<FluxConfig> = {
  num_layers: 4,
  num_single_layers: 6,
  attention_head_dim: 64,
  num_attention_heads: 10,
  joint_attention_dim: 4096,
  pooled_projection_dim: 768,
  axes_dims_rope: [16, 24, 24],
}
const SMALL: Partial<FluxConfig> = {
  ...{ num_layers: 1, num_single_layers: 1, attention_head_dim: 32, num_attention_heads: 2 },
  ...{ joint_attention_dim: 64, pooled_projection_dim: 32, axes_dims_rope: [8, 12, 12] },
}

/** Random features, made once: what a cache of text features costs a step. */
function fixedText(config: Partial<FluxConfig>, maxLength: number): ImmediateTextEncoder {
  const [jointDim, pooledDim] = [config.joint_attention_dim as number, config.pooled_projection_dim as number]
  const embeds = noise(maxLength * jointDim, 1)
  const pooled = noise(pooledDim, 2)
  return {
    ...{ jointDim, pooledDim, maxLength },
    encode: (prompts) => {
      const rows = prompts.length
      const [all, short] = [new Float32Array(rows * embeds.length), new Float32Array(rows * pooledDim)]
      for (let r = 0; r < rows; r++) {
        all.set(embeds, r * embeds.length)
        short.set(pooled, r * pooledDim)
      }
      return {
        embeds: Tensor.from(all, [rows, maxLength, jointDim]),
        mask: prompts.map(() => new Array<number>(maxLength).fill(1)),
        pooled: Tensor.from(short, [rows, pooledDim]),
      }
    },
  }
}

/**
 * One step of a network of 100 million parameters in bf16 on one packed set of samples of 384p clips of 5 s: its parts,
 * how busy the run keeps the engine, its memory against the plan, and PyTorch's step where there is one.
 */
export async function trainStep(effort: Effort): Promise<Unnamed[]> {
  const shape = effort.quick ? [16, 2, 16, 16] : [16, 16, 48, 80]
  const network = effort.quick ? SMALL : NETWORK
  const text = fixedText(network, effort.quick ? 8 : 128)
  const out = await mkdtemp(join(tmpdir(), 'pyraflow-bench-run-'))
  try {
    return await withRandomLatents(
      4,
      async (data) => {
        await engine.idle()
        const others = engine.memory().live
        const model = createVelocityNetwork(network, { seed: 1, dtype: 'bf16', train: true })
        const layouts: Layout[] = []
        const layoutOf = model.layoutSteps.bind(model)
        model.layoutSteps = function* (inputs) {
          const layout = yield* layoutOf(inputs)
          layouts.push(layout)
          return layout
        }
        const syncGroup = effort.quick ? 1 : 8
        const trainer = new Trainer({
          ...{ model, data, text, out, syncGroup, batchSize: 4, steps: 1000, seed: 1 },
          captionDrop: 0,
        })
        try {
          const rows = await measure(effort, trainer, others)
          return [...rows, ...(await peer(effort, network, rows[0] as Unnamed, layouts[0] as Layout))]
        } finally {
          trainer.dispose()
          model.dispose()
        }
      },
      shape,
    )
  } finally {
    await rm(out, { recursive: true, force: true })
  }
}

async function measure(effort: Effort, trainer: Trainer, others: number): Promise<Unnamed[]> {
  const plan = await trainer.plan()
  // The first step has the most tokens of rank 0's two, so it is the one that the plan's peak is of.
  await timeSteps(trainer, 1)
  engine.resetPeak()
  engine.profile(true)
  const runs = effort.quick ? 1 : 3
  const times = await timeSteps(trainer, runs)
  const products = productShare(engine.profileRead())
  const parts = breakdown('step', runs, 14)
  const peak = engine.memory().peak - others
  const idle = await idleShare(trainer, effort.quick ? 1 : 3)
  engine.profile(false)
  const seconds = median(times.map(({ done }) => done))
  const millions = Math.round(plan.parameters / 1e6)
  return [
    {
      name: `step of ${millions} M parameters, ${plan.tokens.longest} tokens, bf16`,
      value: seconds,
      unit: 's',
    },
    { name: 'its products and attention', value: plan.flops.longest / seconds / 1e9, unit: 'GFLOP/s' },
    {
      name: 'matmul and attention, of kernel time',
      value: 100 * products,
      unit: '%',
      required: { of: 'value', atLeast: 75 },
    },
    { name: 'engine idle in a run', value: 100 * idle, unit: '%', required: { of: 'value', atMost: 3 } },
    { name: 'peak memory', value: peak / 2 ** 30, unit: 'GiB' },
    {
      name: 'peak memory over plan',
      value: peak / plan.bytes.peak,
      unit: '×',
      required: { of: 'value', atLeast: 0.9, atMost: 1.1 },
    },
    ...parts,
  ]
}

/** Share of a run's time in which the engine runs no kernel: waiting for data, JavaScript and dispatch together. */
async function idleShare(trainer: Trainer, steps: number): Promise<number> {
  const kernels = (): number => engine.profileRead().reduce((n, { seconds }) => n + seconds, 0)
  let [began, before, done] = [0, 0, 0]
  for await (const event of trainer.run()) {
    if (event.type !== 'step') continue
    // Counted from the end of the first step, so that beginning a run is no part of it.
    if (done === 0) {
      began = performance.now()
      before = kernels()
    }
    if (done++ === steps) break
  }
  return 1 - (1000 * (kernels() - before)) / (performance.now() - began)
}

async function peer(
  effort: Effort,
  network: Partial<FluxConfig>,
  ours: Unnamed,
  layout: Layout,
): Promise<Unnamed[]> {
  const sequences: TorchSequence[] = layout.columns.map(({ clips }) => ({
    text: layout.textLength,
    frames: clips.flatMap(({ frames, tokens }) => new Array<number>(frames).fill(tokens / frames)),
  }))
  const found = torchStep(network, sequences, engine.device.threads, effort.quick ? 1 : 3)
  if (typeof found === 'string') {
    process.stderr.write(`  PyTorch is left out: ${found}\n`)
    return []
  }
  const name = `the same step in PyTorch ${found.version}, bf16 autocast, unfused attention`
  const rate = { value: 1 / ours.value, unit: '1/s' }
  return [
    { name, value: found.answer, unit: 's' },
    { name: `${name}, glibc told to keep freed memory`, value: found.tuned, unit: 's' },
    {
      ...{ name: 'steps per second', ...rate, ratio: found.answer / ours.value, against: 'PyTorch' },
      required: { of: 'ratio', atLeast: 2 },
    },
    {
      ...{ name: 'steps per second', ...rate, ratio: found.tuned / ours.value },
      against: 'PyTorch, freed memory kept',
    },
  ]
}
