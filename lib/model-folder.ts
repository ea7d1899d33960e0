import { existsSync, readdirSync, statSync } from 'node:fs'
import { basename, dirname, join, resolve } from 'node:path'
import { PyraflowError } from './engine/errors.ts'
import { nearestName } from './io/nearest-name.ts'
import { readConfig, readJsonObject } from './io/pretrained.ts'
import { identify, type ModelKind } from './models/identify.ts'
import { type NetworkKind, networkKind } from './models/load-network.ts'
import { latentNormalisation, recommendedSizes } from './models/presets.ts'
import type { PipelineConfig } from './pipeline.ts'
import { architectureOf } from './text/network.ts'
import { textLayoutOf } from './text/prompt-networks.ts'
import { checkTokenizers } from './text/prompt-tokenizers.ts'

export const VAE_FOLDER = 'causal_video_vae'
const TRANSFORMER = 'diffusion_transformer'

/** What a model folder holds, by its folders and config.json files; no weight was looked at. */
export interface ModelFolder {
  readonly dir: string
  /** Folder name of the transformer that was asked for, or chosen. */
  readonly variant: string
  /** All that are there. */
  readonly variants: readonly string[]
  readonly kind: NetworkKind
  /** `pyraflow.json`, with what the published variant is known for where it says nothing. */
  readonly config: PipelineConfig
  /** Whether the text encoders are networks as published models have them, and not a word encoder. */
  readonly published: boolean
}

const PARTS: Record<ModelKind, string> = {
  flux: 'a transformer',
  mmdit: 'a transformer of the SD3 variant',
  vae: 'a VAE',
  t5: 'a T5 text encoder',
  clip: 'a CLIP text encoder',
}

/**
 * Looks at a model folder. Of several transformers the one asked for is taken, by its folder name or the end of it
 * (`768p`); else the only one, else that for 384p, which takes the least memory, else the first of 768p, image and the
 * rest in alphabetical order.
 *
 * @throws ERR_CHECKPOINT saying what the folder is, or lacks, and what is nearest to it
 */
export function surveyFolder(dir: string, options: { variant?: string | undefined } = {}): ModelFolder {
  const names = listed(dir)
  const variants = names.filter((name) => name.startsWith(TRANSFORMER)).sort()
  if (variants.length === 0) throw notAModel(dir, names)
  const variant = chosen(dir, variants, options.variant)
  const kind = networkKind(join(dir, variant))
  checkPart(dir, VAE_FOLDER, names, ['vae'])
  return {
    dir,
    variant,
    variants,
    kind,
    config: pipelineConfig(dir, variant, kind),
    published: checkText(dir, names, variant, kind),
  }
}

function listed(dir: string): string[] {
  if (existsSync(dir) && statSync(dir).isDirectory()) return readdirSync(dir).sort()
  const [parent, name] = [dirname(resolve(dir)), basename(dir)]
  const around = existsSync(parent) && statSync(parent).isDirectory() ? readdirSync(parent) : []
  const near = nearestName(name, around)
  throw wrong(
    dir,
    'a folder',
    existsSync(dir) ? 'a file' : 'nothing there',
    near && `Nearest there is '${near}'.`,
  )
}

// A part by itself, or something else altogether.
function notAModel(dir: string, names: readonly string[]): PyraflowError {
  const expected = `${TRANSFORMER}…, ${VAE_FOLDER} and text_encoder in it`
  if (names.includes('config.json')) {
    const above = dirname(resolve(dir))
    return wrong(
      dir,
      expected,
      `${PARTS[identify(dir)]} by itself`,
      existsSync(join(above, VAE_FOLDER)) && existsSync(join(above, 'text_encoder'))
        ? `Give the folder above it, ${above}.`
        : 'Give the folder that holds it beside the other parts of the model.',
    )
  }
  const inside = names.find(
    (name) =>
      statSync(join(dir, name)).isDirectory() &&
      readdirSync(join(dir, name)).some((inner) => inner.startsWith(TRANSFORMER)),
  )
  const remedy = inside === undefined ? 'Complete the download.' : `Give ${join(dir, inside)}.`
  return wrong(dir, expected, names.slice(0, 8).join(', ') || 'an empty folder', remedy)
}

function chosen(dir: string, variants: readonly string[], asked: string | undefined): string {
  if (asked === undefined) {
    const preferred = ['384p', '768p', 'image'].map((end) => `${TRANSFORMER}_${end}`)
    return preferred.find((name) => variants.includes(name)) ?? (variants[0] as string)
  }
  const found = variants.find((name) => name === asked || name === `${TRANSFORMER}_${asked}`)
  if (found !== undefined) return found
  const near = nearestName(`${TRANSFORMER}_${asked.replace(`${TRANSFORMER}_`, '')}`, variants)
  throw wrong(`${dir}: variant`, variants.join(' or '), asked, `Nearest is '${near}'.`)
}

function checkPart(dir: string, name: string, names: readonly string[], kinds: readonly ModelKind[]): void {
  if (!names.includes(name)) {
    const near = names.length > 0 ? `; nearest is '${nearestName(name, names)}'` : ''
    throw wrong(dir, `a folder ${name}`, `none${near}`, 'Complete the download of the model.')
  }
  const kind = identify(join(dir, name))
  if (kinds.includes(kind)) return
  throw wrong(
    join(dir, name),
    PARTS[kinds[0] as ModelKind],
    PARTS[kind],
    'Check that folders have not changed places.',
  )
}

// Whether the text encoders are published ones; they must be those of the transformer's family.
function checkText(dir: string, names: readonly string[], variant: string, kind: NetworkKind): boolean {
  if (!names.includes('text_encoder')) {
    throw wrong(dir, 'a folder text_encoder', 'none', 'Complete the download of the model.')
  }
  if (architectureOf(readConfig(join(dir, 'text_encoder'))) === 'WordEncoder') return false
  checkPart(dir, 'text_encoder', names, ['clip'])
  const layout = textLayoutOf(dir)
  const wanted = kind === 'mmdit' ? 'sd3' : 'flux'
  if (layout !== wanted) {
    const encoders = { sd3: 'three text encoders', flux: 'two text encoders' }
    throw wrong(
      dir,
      `${encoders[wanted]}, as ${variant} (${kind === 'mmdit' ? 'the SD3 variant' : 'miniFLUX'}) needs`,
      encoders[layout],
      'The folder mixes parts of the two published models: download one of them into a folder of its own.',
    )
  }
  checkTokenizers(dir)
  return true
}

function pipelineConfig(dir: string, variant: string, kind: NetworkKind): PipelineConfig {
  const path = join(dir, 'pyraflow.json')
  const own: Partial<PipelineConfig> = existsSync(path)
    ? readJsonObject(path, {
        expected: 'settings of the pipeline',
        remedy: 'Check that the file can be read.',
      })
    : {}
  const end = variant.replace(`${TRANSFORMER}_`, '')
  const known = Object.entries(recommendedSizes).find(([name]) => name === end)?.[1]
  const sizes = known?.map(([w, h]): [number, number] => [w, h])
  return { normalisation: latentNormalisation[kind], ...(sizes && { sizes }), ...own }
}

function wrong(what: string, expected: string, received: string, remedy: string | undefined): PyraflowError {
  return new PyraflowError('ERR_CHECKPOINT', { what: `model folder ${what}`, expected, received, remedy })
}
