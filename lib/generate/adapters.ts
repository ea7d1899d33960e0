import { type AdapterChoice, type BlendedNetwork, blendAdapters, openAdapters } from '../lora/blend.ts'
import type { Pipeline } from '../pipeline.ts'
import type { GenerateOptions } from './options.ts'
import type { Recipe } from './recipe.ts'

/** The adapters of a request: those given, else those of the video that is continued, else the pipeline's. */
export function adaptersOf(
  pipeline: Pipeline,
  options: GenerateOptions,
  parent: Recipe | undefined,
): NonNullable<Recipe['adapters']> {
  // A recipe names all that it was made with: one without adapters was made without.
  const made = parent !== undefined || 'dtype' in options
  const choices = options.adapters ?? parent?.adapters ?? (made ? [] : pipeline.adapters)
  return choices.map((choice: AdapterChoice) => ({ ...choice, scale: choice.scale ?? 1 }))
}

/**
 * The network that a recipe wants, with its adapters as they now are on disk.
 *
 * @throws ERR_IO, ERR_CHECKPOINT as `openAdapter`; ERR_ABORTED
 */
export async function networkOf(
  pipeline: Pipeline,
  { adapters = [] }: Recipe,
  work: { signal: AbortSignal | undefined; onWarning: (message: string) => void },
): Promise<BlendedNetwork & { facts: Pick<Recipe, 'adapters'> }> {
  if (adapters.length === 0) return { network: pipeline.transformer, dispose: () => undefined, facts: {} }
  const opened = await openAdapters(pipeline.transformer, adapters)
  const base = await pipeline.networkHash()
  for (const [i, { file }] of opened.entries()) {
    const { path, hash = file.hash } = adapters[i] as (typeof adapters)[number]
    if (hash !== file.hash) {
      work.onWarning(
        `The recipe was made with another adapter ${path} (${hash}, not ${file.hash}): the video will differ`,
      )
    }
    if (file.base !== undefined && base !== undefined && file.base !== base) {
      work.onWarning(
        `The adapter ${path} was trained on other weights (${file.base}, not ${base}): it may do less or harm`,
      )
    }
  }
  const named = opened.map(({ file: { path, hash }, scale }) => ({ path, scale, hash }))
  const blended = await blendAdapters(pipeline.transformer, opened, work.signal)
  return { ...blended, facts: { adapters: named } }
}
