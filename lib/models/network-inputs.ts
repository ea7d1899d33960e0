import { PyraflowError } from '../engine/errors.ts'
import type { Layout } from '../pyramid/layout.ts'
import { Tensor } from '../tensor/tensor.ts'
import type { TransformerInputs } from './velocity-network.ts'

/** Sizes that the inputs of a network must have. */
export interface InputSizes {
  readonly channels: number
  readonly textWidth: number
  readonly pooledWidth: number
}

/** @throws ERR_SHAPE or ERR_DTYPE naming the input that does not fit. */
export function checkInputs(inputs: TransformerInputs, sizes: InputSizes): void {
  const { columns, timesteps, text, pooled } = inputs
  const { channels, textWidth, pooledWidth } = sizes
  const first = columns[0]?.[0]
  if (!first || columns.some((clips) => clips.length === 0)) {
    throw mismatch('columns', 'at least one, each with a clip', 'none')
  }
  const batch = first.shape[0] as number
  const rows = batch * columns.length
  columns.forEach((clips, c) => {
    clips.forEach((clip, j) => {
      if (clip.rank === 5 && clip.shape[0] === batch && clip.shape[1] === channels) return
      throw mismatch(`columns[${c}][${j}]`, `[${batch}, ${channels}, t, h, w]`, clip)
    })
  })
  checkTimesteps(timesteps, rows)
  if (text.rank !== 3 || text.shape[0] !== rows || text.shape[1] === 0 || text.shape[2] !== textWidth) {
    throw mismatch('text', `[${rows}, S, ${textWidth}]`, text)
  }
  if (pooled.rank !== 2 || pooled.shape[0] !== rows || pooled.shape[1] !== pooledWidth) {
    throw mismatch('pooled', `[${rows}, ${pooledWidth}]`, pooled)
  }
  for (const [name, t] of [
    ...columns.flat().map((t) => ['columns', t] as const),
    ['text', text],
    ['pooled', pooled],
  ] as const) {
    if (t.dtype === 'f32' || t.dtype === 'bf16') continue
    throw new PyraflowError('ERR_DTYPE', { what: name, expected: 'f32 or bf16', received: t.dtype })
  }
}

function checkTimesteps(timesteps: ArrayLike<number>, rows: number): void {
  if (timesteps instanceof Tensor || typeof timesteps.length !== 'number') {
    const received = timesteps instanceof Tensor ? 'a tensor' : typeof timesteps
    throw new PyraflowError('ERR_DTYPE', { what: 'timesteps', expected: 'numbers', received })
  }
  const bad = Array.from(timesteps).find((t) => !Number.isFinite(t))
  if (timesteps.length === rows && bad === undefined) return
  const received = bad === undefined ? `${timesteps.length}` : `${bad}`
  throw mismatch('timesteps', `${rows} finite numbers`, received)
}

/** A layout that was made for other sizes would read the wrong rows. @throws ERR_SHAPE */
export function checkLayout({ columns, text }: TransformerInputs, layout: Layout): void {
  const sizes = layout.columns.map(({ clips }) => clips.map((c) => `${c.frames}×${c.height}×${c.width}`))
  const given = columns.map((clips) => clips.map(({ shape }) => shape.slice(2).join('×')))
  const rows = text.shape[0] as number
  if (`${sizes}` === `${given}` && layout.rows === rows && layout.textLength === text.shape[1]) return
  throw mismatch(
    'layout',
    `one for clips of ${given.join(' | ')} and text [${text.shape}]`,
    `${sizes.join(' | ')}`,
  )
}

/** @throws ERR_OPTION or ERR_SHAPE where keys and values cannot be kept, or those kept are of other tokens. */
export function checkPast(
  { keep, past }: TransformerInputs,
  layout: Layout,
  parameters: ReadonlyMap<string, Tensor>,
): void {
  const keys = past ?? keep
  if (keep && past) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'keep and past',
      expected: 'one of them',
      received: 'both',
    })
  }
  if (keys?.layout !== layout) {
    throw mismatch('layout', 'the one for which keys and values are kept', 'another')
  }
  // In training q and k are turned apart from the attention, and what would be kept is not what it reads.
  if (![...parameters.values()].some((p) => p.requiresGrad)) return
  throw new PyraflowError('ERR_OPTION', {
    what: 'kept keys and values',
    expected: 'a network that was not made for training',
    received: 'parameters that want gradients',
  })
}

function mismatch(what: string, expected: string, received: Tensor | string): PyraflowError {
  const text = received instanceof Tensor ? `[${received.shape.join(', ')}]` : received
  return new PyraflowError('ERR_SHAPE', { what, expected, received: text })
}
