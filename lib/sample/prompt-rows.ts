import { concat } from '../ops/copy.ts'
import { keep, scope } from '../tensor/scope.ts'
import { disposeFeatures, type TextFeatures } from '../text/encoder.ts'

/** The rows of text that a network call gets: under guidance those of the negative prompt, then of the prompt. */
export class PromptRows {
  readonly #negative: TextFeatures | undefined
  readonly #known = new Map<TextFeatures, TextFeatures>()

  constructor(negative: TextFeatures | undefined) {
    this.#negative = negative
  }

  /** Belongs to this object, or to the caller when not guided. */
  of(text: TextFeatures, guided: boolean): TextFeatures {
    const negative = this.#negative
    if (!guided || !negative) return text
    const known = this.#known.get(text)
    if (known) return known
    const both = scope(() => ({
      embeds: concat([negative.embeds, text.embeds], 0),
      mask: [...negative.mask, ...text.mask],
      pooled: concat([negative.pooled, text.pooled], 0),
    }))
    keep(both.embeds)
    keep(both.pooled)
    this.#known.set(text, both)
    return both
  }

  dispose(): void {
    for (const both of this.#known.values()) disposeFeatures(both)
    this.#known.clear()
  }
}
