import type { Tensor } from '../tensor/tensor.ts'
import { PromptNetworks } from '../text/prompt-networks.ts'
import { compare, exact, relativeL2 } from './compare.ts'
import { Recorded } from './recorded.ts'
import type { CaseRunner, Check } from './types.ts'

const TOLERANCE = { f32: 1e-5, bf16: 2e-2 } as const

function rowsOf(r: Recorded, name: string): number[][] {
  const [count, width] = r.shape(name) as [number, number]
  const flat = r.integers(name)
  return Array.from({ length: count }, (_, i) => flat.slice(i * width, (i + 1) * width))
}

/** The first positions of every row of [R·S, d], as many as were recorded. */
function leading(values: Float32Array, [rows, positions, width]: readonly number[]): Float32Array {
  const all = values.length / rows
  const kept = positions * width
  const result = new Float32Array(rows * kept)
  for (let i = 0; i < rows; i++) result.set(values.subarray(i * all, i * all + kept), i * kept)
  return result
}

/** Prompt features from recorded token ids: hidden states where recorded, features and mask. */
export const runTextCase: CaseRunner = async (dir, json, ctx) => {
  const r = new Recorded(dir, json)
  const networks = await PromptNetworks.fromPretrained(r.sibling(json.model.split('(')[0]), ctx)
  const tolerance = TOLERANCE[ctx.dtype]
  const hidden: { name: string; values: Promise<Float32Array> }[] = []
  const capture = (name: string, tensor: Tensor): void => {
    const recorded = name.replace('clip.0.', 'clip.')
    if (!r.has(recorded)) return
    const values = tensor.floats()
    // Awaited below; until then a failed queue must not look unhandled.
    values.catch(() => undefined)
    hidden.push({ name: recorded, values })
  }
  try {
    const names = networks.layout === 'flux' ? ['clip'] : ['clip_1', 'clip_2']
    const mask = rowsOf(r, 't5_attention_mask')
    const tokens = {
      t5: { ids: rowsOf(r, 't5_input_ids'), mask },
      clip: names.map((name) => rowsOf(r, `${name}_input_ids`)),
    }
    const features = await networks.forward(tokens, { capture })
    const checks: Check[] = []
    for (const { name, values } of hidden) {
      const mine = leading(await values, r.shape(name))
      checks.push({ name, error: relativeL2(mine, r.floats(name)), tolerance })
    }
    const recorded = r.names.filter((name) => name.includes('hidden_states')).sort()
    checks.push(exact('hidden states compared', hidden.map(({ name }) => name).sort(), recorded))
    checks.push(exact('mask', features.mask.flat(), r.integers('prompt_attention_mask')))
    for (const [name, tensor] of [
      ['prompt_embeds', features.embeds],
      ['pooled_prompt_embeds', features.pooled],
    ] as const) {
      checks.push(await compare(name, tensor, { values: r.floats(name), shape: r.shape(name) }, tolerance))
      tensor.dispose()
    }
    return checks
  } finally {
    networks.dispose()
  }
}
