import { type ClipSpec, caption, makeRng, randomSpec, type Split } from './world.ts'

/** A prompt with what its video should show. */
export interface Prompt {
  text: string
  spec: ClipSpec
  heldOut: boolean
}

/** `count` prompts, a third of them combinations of colour, shape and motion that no training clip has. */
export function makePrompts(count: number, seed: number): Prompt[] {
  const rng = makeRng(seed)
  const make = (split: Split): Prompt => {
    const spec = randomSpec(rng, split)
    return { text: caption(spec), spec, heldOut: split === 'heldout' }
  }
  return Array.from({ length: count }, (_, i) => make(i % 3 === 2 ? 'heldout' : 'train'))
}
