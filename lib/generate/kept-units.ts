import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { engine } from '../engine/engine.ts'
import { PyraflowError } from '../engine/errors.ts'
import { removeTemporaries } from '../io/atomic.ts'
import { openSafetensors } from '../io/safetensors.ts'
import { keep } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'
import { latentsEntry, saveLatents, toClip } from './latents.ts'
import type { Recipe } from './recipe.ts'

// Decoding is cut as memory allows; kernels have a warning of their own.
const IRRELEVANT: ReadonlySet<string> = new Set(['maxMemory', 'backend'])

/** The finished units of a video under way, in a file that is whole at every moment. */
export class KeptUnits {
  readonly #path: string
  readonly #recipe: Recipe

  /** Number `video` of the videos whose units this folder keeps. */
  constructor(folder: string, video: number, recipe: Recipe) {
    this.#path = join(folder, `video-${video}.latents.safetensors`)
    this.#recipe = recipe
  }

  /**
   * Normalised latents [1, C, T, h, w] of what was finished before, mapped, which the caller disposes.
   *
   * @throws ERR_IO; ERR_CHECKPOINT for a file that is damaged, or keeps the units of another video
   */
  async read(onWarning: (message: string) => void): Promise<Tensor | undefined> {
    await removeTemporaries(this.#path)
    if (!existsSync(this.#path)) return undefined
    const file = openSafetensors(this.#path)
    const { begin, dtype, shape } = latentsEntry(file)
    const recipe = parsed(file.metadata.recipe)
    if (dtype !== 'F32' || recipe === undefined) {
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: this.#path,
        expected: 'latents in F32 with the recipe of their video',
        received: recipe === undefined ? 'no recipe' : dtype,
        remedy: 'Remove the file, or choose another folder.',
      })
    }
    this.#compare(recipe, onWarning)
    const { id } = engine.openFile(this.#path)
    try {
      return keep(Tensor.mapped(id, begin, shape, 'f32'))
    } finally {
      engine.closeFile(id)
    }
  }

  #compare(kept: Partial<Recipe>, onWarning: (message: string) => void): void {
    const wanted: Partial<Recipe> = this.#recipe
    const names = new Set([...Object.keys(kept), ...Object.keys(wanted)]) as Set<keyof Recipe>
    const text = (value: unknown): string => JSON.stringify(value) ?? 'nothing'
    for (const name of names) {
      const both = [text(kept[name]), text(wanted[name])] as const
      if (both[0] === both[1]) continue
      const [was, is] = both.map((value) => value.slice(0, 80)) as [string, string]
      if (name === 'backend') {
        onWarning(`The units in ${this.#path} were made with other kernels (${was}, not ${is})`)
      }
      if (IRRELEVANT.has(name)) continue
      throw new PyraflowError('ERR_CHECKPOINT', {
        what: `${this.#path}: ${name}`,
        expected: `${is}, as of the video that is asked for`,
        received: was,
        remedy: 'Go on with what it was begun with, remove the file, or choose another folder.',
      })
    }
  }

  /** Replaces what is kept by all units so far. @throws ERR_IO; what was kept before is still there then */
  async write(units: readonly Tensor[]): Promise<void> {
    await saveLatents(this.#path, await toClip(units), { recipe: this.#recipe })
  }
}

function parsed(recipe: string | undefined): Partial<Recipe> | undefined {
  try {
    const value: unknown = JSON.parse(recipe ?? '')
    return typeof value === 'object' && value !== null ? value : undefined
  } catch {
    return undefined
  }
}
