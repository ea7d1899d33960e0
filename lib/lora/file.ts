import { PyraflowError } from '../engine/errors.ts'
import { fingerprint } from '../io/fingerprint.ts'
import { nearestName } from '../io/nearest-name.ts'
import { openSafetensors, type Safetensors } from '../io/safetensors.ts'
import type { LayerSize } from './layers.ts'

/** What a file adds to one layer. */
export interface AdapterLayer extends LayerSize {
  readonly rank: number
  /** The layer adds (alpha/rank)·B(A x). */
  readonly alpha: number
  /** Reads A [rank, inputs] and B [outputs, rank], each row by row. @throws ERR_CHECKPOINT for NaN; ERR_IO */
  read(): { a: Float32Array; b: Float32Array }
}

/** An adapter file whose header was read and checked. */
export interface AdapterFile {
  readonly path: string
  /** Tells this file from others whatever it is called. */
  readonly hash: string
  readonly metadata: Readonly<Record<string, string>>
  /** By layer: names of the network it was matched with, else as the file spells them. */
  readonly layers: ReadonlyMap<string, AdapterLayer>
  /** Hash of the network it was trained on, where the file says so. */
  readonly base: string | undefined
}

type Part = 'down' | 'up' | 'alpha'
type Group = Partial<Record<Part, string>>

// A and B in the spellings of peft and diffusers (lora_A, with or without the adapter's name), of kohya's scripts
// (lora_down) and of early diffusers (lora.down).
const MATRIX = /^(.+?)\.(?:lora_(A|B)(?:\.\w+)?|lora_(down|up)|lora\.(down|up))\.weight$/
const PARTS: Record<string, Part> = { A: 'down', B: 'up', down: 'down', up: 'up' }
const ALPHA = /^(.+)\.alpha$/
const PREFIXES = ['base_model.model.', 'model.diffusion_model.', 'diffusion_model.', 'transformer.', 'dit.']
// Kohya's scripts write every point as an underscore.
const FLAT = /^lora_(?:unet|transformer|dit)_/

/**
 * Opens an adapter. With the layers of a network its keys are matched with them, in either spelling.
 *
 * @throws ERR_IO when it cannot be read; ERR_CHECKPOINT for a file that is cut off or none, a key that no layer has
 * (naming the nearest), half a pair, or a shape that does not fit
 */
export async function openAdapter(
  path: string,
  network?: ReadonlyMap<string, LayerSize>,
): Promise<AdapterFile> {
  const file = openSafetensors(path)
  const alphas = alphasOf(file)
  const layers = new Map<string, AdapterLayer>()
  const flat = new Map(Array.from(network?.keys() ?? [], (name) => [name.replaceAll('.', '_'), name]))
  for (const [stem, group] of groupsOf(file)) {
    const plain = withoutPrefix(stem)
    const name = !network || network.has(plain) ? plain : flat.get(plain.replace(FLAT, ''))
    if (name === undefined) throw unknownLayer(file, group, plain, network as ReadonlyMap<string, LayerSize>)
    if (layers.has(name)) throw wrong(file, name, 'one pair of matrices', 'two spellings of it')
    layers.set(
      name,
      layerFrom(file, group, network?.get(name), (rank) => alphas(name, rank)),
    )
  }
  if (layers.size === 0) {
    const first = file.entries.keys().next().value
    const expected = 'keys such as transformer.….to_q.lora_A.weight'
    throw wrong(file, 'adapter', expected, first === undefined ? 'no tensors' : `'${first}' and others`)
  }
  const { metadata } = file
  const hash = await fingerprint([['adapter', path]])
  return { path, hash, metadata, layers, base: metadata.base_model_hash }
}

function groupsOf(file: Safetensors): Map<string, Group> {
  const groups = new Map<string, Group>()
  for (const key of file.entries.keys()) {
    const [, stem, ab, downUp, dotted] = MATRIX.exec(key) ?? []
    const name = stem ?? ALPHA.exec(key)?.[1]
    const part = stem === undefined ? 'alpha' : PARTS[ab ?? downUp ?? dotted ?? '']
    if (name === undefined || part === undefined) {
      throw wrong(
        file,
        `'${key}'`,
        'lora_A, lora_B, lora_down, lora_up or alpha of a layer',
        'another kind of key',
      )
    }
    const group = groups.get(name) ?? {}
    group[part] = key
    groups.set(name, group)
  }
  return groups
}

function withoutPrefix(stem: string): string {
  return PREFIXES.reduce((name, prefix) => (name.startsWith(prefix) ? name.slice(prefix.length) : name), stem)
}

function unknownLayer(
  file: Safetensors,
  { down, up, alpha }: Group,
  name: string,
  network: ReadonlyMap<string, LayerSize>,
): PyraflowError {
  return wrong(
    file,
    `'${down ?? up ?? alpha}'`,
    'a linear layer of this network',
    `a name it does not have; nearest is '${nearestName(name, network.keys())}'`,
    'The adapter was made for another network.',
  )
}

function layerFrom(
  file: Safetensors,
  group: Group,
  size: LayerSize | undefined,
  alphaOf: (rank: number) => number,
): AdapterLayer {
  const { down, up } = group
  if (down === undefined || up === undefined) {
    const key = down ?? up ?? group.alpha
    throw wrong(file, `'${key}'`, 'A and B of the layer', `no ${down === undefined ? 'A (down)' : 'B (up)'}`)
  }
  const [a, b] = [file.entries.get(down), file.entries.get(up)]
  const shapeOf = (key: string, shape: readonly number[] | undefined, expected: string): PyraflowError =>
    wrong(file, `'${key}'`, expected, `[${shape?.join(', ')}]`, 'The adapter was made for another network.')
  if (a?.shape.length !== 2 || (size && a.shape[1] !== size.inputs) || !a.shape[0]) {
    throw shapeOf(down, a?.shape, `[rank, ${size?.inputs ?? 'inputs'}]`)
  }
  const [rank, inputs] = a.shape as [number, number]
  if (b?.shape.length !== 2 || b.shape[1] !== rank || (size && b.shape[0] !== size.outputs)) {
    throw shapeOf(up, b?.shape, `[${size?.outputs ?? 'outputs'}, ${rank}]`)
  }
  const alpha = group.alpha === undefined ? alphaOf(rank) : (file.readFloats(group.alpha)[0] ?? Number.NaN)
  if (!Number.isFinite(alpha)) throw wrong(file, `alpha of '${down}'`, 'a number', String(alpha))
  const read = (): { a: Float32Array; b: Float32Array } => ({ a: finite(file, down), b: finite(file, up) })
  return { rank, alpha, inputs, outputs: b.shape[0] as number, read }
}

function finite(file: Safetensors, key: string): Float32Array {
  const values = file.readFloats(key)
  if (values.every(Number.isFinite)) return values
  const remedy = 'The file is damaged or comes from a training run that diverged.'
  throw wrong(file, `'${key}'`, 'finite values', 'NaN or infinity', remedy)
}

/**
 * What alpha is where no tensor says it: from the settings that diffusers keeps in the header, else the number in the
 * header of kohya's scripts, else the rank, which is what readers take when nothing is said.
 */
function alphasOf(file: Safetensors): (layer: string, rank: number) => number {
  const { lora_adapter_metadata: text, ss_network_alpha: plain } = file.metadata
  if (text === undefined) return (_, rank) => (plain === undefined ? rank : Number(plain))
  let settings: Record<string, unknown>
  try {
    settings = JSON.parse(text) as Record<string, unknown>
  } catch {
    throw wrong(file, 'lora_adapter_metadata', 'JSON', text.slice(0, 40))
  }
  const of = (name: string): unknown => settings[`transformer.${name}`]
  if (of('use_dora'))
    throw wrong(file, 'use_dora', 'plain low-rank matrices', 'weights decomposed into direction and length')
  const pattern = Object.entries((of('alpha_pattern') ?? {}) as Record<string, number>)
  return (layer, rank) => {
    const own = pattern.find(([name]) => layer === name || layer.endsWith(`.${name}`))?.[1]
    const alpha = Number(own ?? of('lora_alpha') ?? rank)
    // Rank-stabilised adapters are divided by √r instead of r.
    return of('use_rslora') ? alpha * Math.sqrt(rank) : alpha
  }
}

function wrong(
  file: Safetensors,
  what: string,
  expected: string,
  received: string,
  remedy?: string,
): PyraflowError {
  return new PyraflowError('ERR_CHECKPOINT', { what: `${file.path}: ${what}`, expected, received, remedy })
}
