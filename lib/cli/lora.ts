import type { Command } from 'commander'
import type { AdapterChoice } from '../lora/blend.ts'
import { type CommonOptions, interruptible, result, resultJson, UsageError } from './console.ts'
import { adapterChoice, common, configureEngine, gather, option } from './settings.ts'

interface LoraFlags extends CommonOptions {
  model?: string
  variant?: string
  lora?: AdapterChoice[]
  out?: string
}

export function addLora(program: Command): void {
  const command = program.command('lora').description('look at adapters, or merge them into a model')
  const inspecting = command
    .command('inspect')
    .description('layers, ranks and header of adapter files')
    .argument('<files...>', 'adapter files')
  option(inspecting, '--model <dir>', 'model folder: check that the adapters fit its transformer')
  option(inspecting, '--variant <name>', 'folder of the transformer when there are several')
  inspecting.option('--json', 'print the result as one JSON object on stdout').action(inspect)
  const merging = command
    .command('merge')
    .description('write a model folder whose transformer has adapters added to its weights')
  option(merging, '--model <dir>', 'model folder to begin from; it stays as it is')
  option(merging, '--lora <file[:scale]>', 'adapter to add; several may be given', gather(adapterChoice))
  option(merging, '--out <dir>', 'name of the new folder')
  option(merging, '--variant <name>', 'folder of the transformer when there are several')
  common(merging).action(merge)
}

async function inspect(files: string[], { model, variant, json }: LoraFlags): Promise<void> {
  const { openAdapter } = await import('../lora/file.ts')
  const network = model === undefined ? undefined : await layersOf(model, variant)
  const found = []
  for (const path of files) {
    const { hash, layers, metadata, base } = await openAdapter(path, network?.layers)
    const all = [...layers.values()]
    const list = (values: number[]): number[] => [...new Set(values)].sort((a, b) => a - b)
    found.push({
      ...{ path, hash, layers: layers.size },
      ranks: list(all.map(({ rank }) => rank)),
      alphas: list(all.map(({ alpha }) => alpha)),
      parameters: all.reduce((n, { rank, inputs, outputs }) => n + rank * (inputs + outputs), 0),
      ...(base === undefined ? {} : { base }),
      ...(network === undefined
        ? {}
        : { fits: base === undefined || base === network.hash ? 'yes' : 'other weights' }),
      metadata,
    })
  }
  if (json) return resultJson({ adapters: found })
  for (const { path, layers, ranks, alphas, parameters, base, fits, metadata } of found) {
    result(
      `${path}: ${layers} layers, rank ${ranks.join(', ')}, alpha ${alphas.join(', ')}, ${parameters} parameters`,
    )
    if (base !== undefined)
      result(`  trained on ${base}${fits === 'other weights' ? ', which is not this model' : ''}`)
    if (metadata.recipe !== undefined) result(`  recipe ${metadata.recipe}`)
  }
}

// Names and shapes alone: the weights stay unread.
async function layersOf(model: string, variant: string | undefined) {
  const { join } = await import('node:path')
  const { surveyFolder } = await import('../model-folder.ts')
  const { folderFingerprint } = await import('../io/fingerprint.ts')
  const { openWeights } = await import('../io/safetensors.ts')
  const { linearLayers } = await import('../lora/layers.ts')
  const dir = join(model, surveyFolder(model, { variant }).variant)
  return {
    layers: linearLayers({ parameters: openWeights(dir).entries }),
    hash: await folderFingerprint(dir),
  }
}

async function merge({ model, lora = [], out, variant, json, ...flags }: LoraFlags): Promise<void> {
  if (model === undefined) throw new UsageError('missing --model')
  if (lora.length === 0) throw new UsageError('missing --lora')
  if (out === undefined) throw new UsageError('missing --out')
  await configureEngine(flags)
  const { mergeAdapters } = await import('../lora/merge.ts')
  const { signal, release } = interruptible()
  try {
    await mergeAdapters(model, lora, out, { variant, signal })
  } finally {
    release()
  }
  if (json) resultJson({ model: out, adapters: lora })
  else result(out)
}
