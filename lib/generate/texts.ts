import type { Pipeline } from '../pipeline.ts'
import { disposeFeatures, type TextFeatures } from '../text/encoder.ts'
import type { Recipe } from './recipe.ts'

/** Features of all prompts of some videos, each encoded once. */
export class PromptFeatures {
  readonly #suffix: string
  readonly #known = new Map<string, TextFeatures>()

  private constructor(suffix: string) {
    this.#suffix = suffix
  }

  /** @throws ERR_OPTION for a prompt that the encoder cannot take; ERR_ABORTED */
  static async of(
    pipeline: Pipeline,
    recipes: readonly Recipe[],
    options: { signal: AbortSignal | undefined; onWarning: (message: string) => void },
  ): Promise<PromptFeatures> {
    const made = new PromptFeatures(pipeline.config.promptSuffix ?? pipeline.text.promptSuffix ?? '')
    const texts = new Set<string>()
    for (const { prompt, promptChanges = [], negativePrompt } of recipes) {
      for (const text of [prompt, ...promptChanges.map((change) => change.prompt)])
        texts.add(made.#full(text))
      texts.add(negativePrompt)
    }
    const features = await pipeline.encodePrompts([...texts], options)
    for (const [i, text] of [...texts].entries()) made.#known.set(text, features[i] as TextFeatures)
    return made
  }

  of(prompt: string): TextFeatures {
    return this.#known.get(this.#full(prompt)) as TextFeatures
  }

  negative(prompt: string): TextFeatures {
    return this.#known.get(prompt) as TextFeatures
  }

  // The empty prompt is the null condition and stays empty.
  #full(prompt: string): string {
    return prompt === '' ? '' : prompt + this.#suffix
  }

  dispose(): void {
    for (const features of this.#known.values()) disposeFeatures(features)
    this.#known.clear()
  }
}
