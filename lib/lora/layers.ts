/** Sizes of a layer x [..., inputs] → [..., outputs]. */
export interface LayerSize {
  readonly inputs: number
  readonly outputs: number
}

/** What adapters change unless told otherwise: the projections of every attention, of both network families. */
export const attentionProjections: readonly string[] = [
  ...['to_q', 'to_k', 'to_v', 'to_out.0'],
  ...['add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out'],
]

/** A network, or what its file says of its tensors. */
export interface Shapes {
  readonly parameters: Iterable<readonly [string, { readonly shape: readonly number[] }]>
}

/** The linear layers of a network, by name: the key of the weight without `.weight`. */
export function linearLayers(network: Shapes): Map<string, LayerSize> {
  const found = new Map<string, LayerSize>()
  for (const [key, { shape }] of network.parameters) {
    // Every matrix of these networks is one; kernels of convolutions have more axes.
    if (!key.endsWith('.weight') || shape.length !== 2) continue
    const [outputs, inputs] = shape as [number, number]
    found.set(key.slice(0, -'.weight'.length), { inputs, outputs })
  }
  return found
}
