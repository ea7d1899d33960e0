import { loadVelocityNetwork } from '../models/load-network.ts'
import type { TransformerInputs, VelocityNetwork } from '../models/velocity-network.ts'
import { concat } from '../ops/copy.ts'
import { mse } from '../ops/mse.ts'
import { mean } from '../ops/reduce.ts'
import type { Layout } from '../pyramid/layout.ts'
import { scope } from '../tensor/scope.ts'
import { backward, clearTape, noGrad } from '../tensor/tape.ts'
import type { Tensor } from '../tensor/tensor.ts'
import { compare, compareGradients, relativeL2, scalar } from './compare.ts'
import { Recorded } from './recorded.ts'
import type { CaseRunner, Check } from './types.ts'

/** Relative L2 that is accepted of outputs and activations, and of gradients. */
const TOLERANCE = { f32: 1e-5, bf16: 2e-2 } as const
const GRADIENTS = 1e-4

const expected = (r: Recorded, name: string) => ({ values: r.floats(name), shape: r.shape(name) })

/** Tensors of one recorded call; the caller disposes them. */
interface Inputs extends TransformerInputs {
  columns: Tensor[][]
  all: Tensor[]
}

/** The recorded inputs of a network call, in `dtype`. */
function inputsOf(r: Recorded, dtype: 'f32' | 'bf16'): Inputs {
  const columns: Tensor[][] = []
  for (let c = 0; r.has(`sample.${c}.0`); c++) {
    columns.push([])
    for (let j = 0; r.has(`sample.${c}.${j}`); j++) columns[c].push(r.tensor(`sample.${c}.${j}`, dtype))
  }
  const text = r.tensor('encoder_hidden_states', dtype)
  const pooled = r.tensor('pooled_projections', dtype)
  return {
    columns,
    timesteps: r.floats('timestep_ratio'),
    text,
    textMask: r.integers('encoder_attention_mask'),
    pooled,
    all: [...columns.flat(), text, pooled],
  }
}

/** Rows of a captured [tokens, d] tensor in the record's order [bs, columns side by side, d]. */
function asRecorded(name: string, values: Float32Array, width: number, layout: Layout): Float32Array {
  const whole = name === 'temb' || name === 'context_embedder' || name.endsWith('encoder_hidden_states')
  if (whole || name.startsWith('pos_embed.')) return values
  const joint = name.startsWith('single_')
  const rows: number[] = []
  for (let b = 0; b < layout.batch; b++) {
    layout.columns.forEach((column, c) => {
      if (joint) {
        const r = b * layout.columns.length + c
        for (let i = 0; i < layout.textLength; i++) rows.push(r * layout.textLength + i)
      }
      const first = joint ? layout.textTokens : 0
      for (let i = 0; i < column.tokens; i++) rows.push(first + layout.latentIndexOf(c, b, i))
    })
  }
  const result = new Float32Array(rows.length * width)
  rows.forEach((row, i) => {
    result.set(values.subarray(row * width, (row + 1) * width), i * width)
  })
  return result
}

/** The masks and rotations that a layout stands for, against the recorded dense ones. */
function compareLayout(r: Recorded, layout: Layout): Check[] {
  const checks: Check[] = []
  const { textLength: s, textTokens, segment, order, jointCos, jointSin } = layout
  layout.columns.forEach((column, c) => {
    const tokensOf = (b: number): number[] => {
      const row = b * layout.columns.length + c
      const text = Array.from({ length: s }, (_, i) => row * s + i)
      return [
        ...text,
        ...Array.from({ length: column.tokens }, (_, i) => textTokens + layout.latentIndexOf(c, b, i)),
      ]
    }
    if (r.has(`attention_mask.${c}`)) {
      const mask: number[] = []
      for (let b = 0; b < layout.batch; b++) {
        const tokens = tokensOf(b)
        for (const i of tokens) {
          for (const j of tokens) mask.push(segment[i] === segment[j] && order[i] >= order[j] ? 1 : 0)
        }
      }
      const wrong = r.integers(`attention_mask.${c}`).filter((v, i) => v !== mask[i]).length
      checks.push({ name: `attention mask ${c}`, error: wrong, tolerance: 0 })
    }
    if (r.has(`rotary.${c}`)) {
      const pairs = jointCos.length / segment.length
      const table = tokensOf(0).flatMap((token) =>
        Array.from({ length: pairs }, (_, p) => {
          const [cos, sin] = [jointCos[token * pairs + p], jointSin[token * pairs + p]]
          return [cos, -sin, sin, cos]
        }).flat(),
      )
      checks.push({
        name: `rotation ${c}`,
        error: relativeL2(table, r.floats(`rotary.${c}`)),
        tolerance: 1e-6,
      })
    }
  })
  return checks
}

async function compareOutputs(
  outputs: readonly Tensor[],
  r: Recorded,
  prefix: string,
  tolerance: number,
): Promise<Check[]> {
  const checks: Check[] = []
  for (const [c, output] of outputs.entries()) {
    checks.push(await compare(`${prefix}.${c}`, output, expected(r, `${prefix}.${c}`), tolerance))
    output.dispose()
  }
  return checks
}

/** Outputs, activations, masks, loss and gradients in f32. */
async function runFull(
  r: Recorded,
  json: { loss_value: number; gradient_table: { rows: [string, number, number][] } },
  model: VelocityNetwork,
): Promise<Check[]> {
  const inputs = inputsOf(r, 'f32')
  for (const tensor of inputs.all) tensor.requiresGrad = true
  const layout = model.layout(inputs)
  const checks = compareLayout(r, layout)
  const activations = new Map<string, Promise<Float32Array>>()
  const capture = (name: string, tensor: Tensor): void => {
    if (!r.has(`act.${name}`)) return
    const values = tensor.floats()
    // Awaited below; until then a failed queue must not look unhandled.
    values.catch(() => undefined)
    activations.set(name, values)
  }
  const made = scope(() => {
    const outputs = model.forward({ ...inputs, layout, capture })
    const losses = outputs.map((output, c) => mse(output, r.tensor(`target.${c}`)))
    const loss = mean(concat(losses, 0))
    backward(loss)
    return { outputs, loss }
  })
  clearTape()
  checks.push(...(await compareOutputs(made.outputs, r, 'output', TOLERANCE.f32)))
  for (const name of r.names.filter((n) => n.startsWith('act.')).map((n) => n.slice(4))) {
    const values = await activations.get(name)
    const width = r.shape(`act.${name}`).at(-1) as number
    const error = values
      ? relativeL2(asRecorded(name, values, width, layout), r.floats(`act.${name}`))
      : Number.POSITIVE_INFINITY
    checks.push({ name: `act.${name}`, error, tolerance: TOLERANCE.f32 })
  }
  checks.push(scalar('loss', await made.loss.item(), json.loss_value, TOLERANCE.f32))
  made.loss.dispose()

  for (const [name, tensor] of namedInputs(inputs)) {
    const grad = tensor.grad as Tensor
    checks.push(await compare(`gradient of ${name}`, grad, expected(r, `input_grad.${name}`), GRADIENTS))
  }
  const full = r.file('full_grads.safetensors')
  const record = {
    rows: json.gradient_table.rows,
    values: (name: string) =>
      full?.entries.has(`grad.${name}`)
        ? full.readFloats(`grad.${name}`)
        : r.has(`gsample.${name}`)
          ? r.floats(`gsample.${name}`)
          : undefined,
  }
  checks.push(...(await compareGradients((name) => model.parameters.get(name)?.grad, record, GRADIENTS)))
  for (const tensor of [...inputs.all, ...model.parameters.values()]) {
    tensor.grad?.dispose()
    tensor.grad = null
  }
  for (const tensor of inputs.all) tensor.dispose()
  return checks
}

function namedInputs(inputs: Inputs): [string, Tensor][] {
  return [
    ['encoder_hidden_states', inputs.text],
    ['pooled_projections', inputs.pooled],
    ...inputs.columns.flatMap((clips, c) => clips.map((t, j) => [`sample.${c}.${j}`, t] as [string, Tensor])),
  ]
}

/** A record of which every tensor comes from one file. */
function half(r: Recorded): Recorded | undefined {
  const file = r.file('bf16.safetensors')
  if (!file) return undefined
  const tensors = [...file.entries.keys()].map((name) => ({ file: 'bf16.safetensors', name }))
  return new Recorded(r.dir, { tensors })
}

/**
 * A recorded call of a network. f32: everything recorded, and the outputs on bf16-rounded inputs.
 * bf16: the outputs against the f32 ones, with τ rounded as the sampler does where that was recorded.
 */
export const runDitCase: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const bf16 = half(r)
  const train = ctx.dtype === 'f32'
  const model = await loadVelocityNetwork(r.sibling(json.model), {
    dtype: ctx.dtype,
    train,
  })
  const checks: Check[] = []
  try {
    if (train) checks.push(...(await runFull(r, json, model)))
    const tolerance = TOLERANCE[ctx.dtype]
    const infer = async (
      type: 'f32' | 'bf16',
      settings: Partial<TransformerInputs>,
      of: Recorded,
      name: string,
    ) => {
      const inputs = inputsOf(r, type)
      const outputs = noGrad(() => model.forward({ ...inputs, ...settings }))
      for (const tensor of inputs.all) tensor.dispose()
      checks.push(...(await compareOutputs(outputs, of, name, tolerance)))
    }
    if (!train) await infer('bf16', { roundTimesteps: false }, r, 'output')
    if (r.has('output_noncausal.0')) {
      await infer(ctx.dtype, { causal: false, roundTimesteps: false }, r, 'output_noncausal')
    }
    if (bf16) await infer('bf16', { roundTimesteps: true }, bf16, 'output_fp32_same_inputs')
    if (bf16 && !train) await infer('bf16', {}, bf16, 'output')
  } finally {
    model.dispose()
  }
  return checks
}
