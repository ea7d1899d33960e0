import { type ErrorCode, PyraflowError } from '../engine/errors.ts'
import type { NetworkConfig } from './velocity-network.ts'

/** Refuses one field of a config.json. */
export type FieldError = (field: string, expected: string, received: unknown) => PyraflowError

/** How the fields of one class of network are read. */
export interface FieldRules<C extends object> {
  readonly className: string
  /** Every field that the network reads, as it is when absent; they also give its type. */
  readonly defaults: Readonly<C>
  /** Whole numbers that may be 0; others begin at 1. */
  readonly countsFromZero: readonly (keyof C & string)[]
}

/** `fail` for errors of this code. */
export function fieldError(code: ErrorCode): FieldError {
  return (field, expected, received) =>
    new PyraflowError(code, {
      what: `config: ${field}`,
      expected,
      received: JSON.stringify(received) ?? 'nothing',
    })
}

/**
 * Fills in what `given` lacks, drops what no field is called, and checks class, booleans, whole numbers and the share of
 * recomputed blocks.
 *
 * @throws what `fail` makes of the first field that is wrong.
 */
export function readFields<C extends object>(
  given: object,
  { className, defaults, countsFromZero }: FieldRules<C>,
  fail: FieldError,
): C {
  const source = given as Record<string, unknown>
  const name = source._class_name
  if (name !== undefined && name !== className) throw fail('_class_name', className, name)
  const config: Record<string, unknown> = {}
  for (const [field, standard] of Object.entries(defaults)) {
    const value = source[field] ?? standard
    if (typeof standard === 'boolean' && typeof value !== 'boolean') throw fail(field, 'true or false', value)
    const share = field === 'gradient_checkpointing_ratio'
    if (share && !((value as number) >= 0 && (value as number) <= 1)) {
      throw fail(field, 'a number from 0 to 1', value)
    }
    const least = (countsFromZero as readonly string[]).includes(field) ? 0 : 1
    if (typeof standard === 'number' && !share) {
      if (!Number.isSafeInteger(value) || (value as number) < least) {
        throw fail(field, `a whole number from ${least}`, value)
      }
    }
    config[field] = Array.isArray(value) ? [...value] : value
  }
  return config as C
}

/** What the number of parameters depends on. */
export interface ParameterSizes {
  readonly width: number
  readonly headDim: number
  readonly pooled: number
  readonly text: number
  /** 4 × latent channels. */
  readonly patch: number
}

/** The sizes of a configuration; `patch` is 4 × latent channels. */
export function parameterSizes(c: NetworkConfig, patch: number): ParameterSizes {
  const headDim = c.attention_head_dim
  const width = c.num_attention_heads * headDim
  return { width, headDim, pooled: c.pooled_projection_dim, text: c.joint_attention_dim, patch }
}

/** Parameters of a two-stream block (spec/dit-flux.md eq. 14). */
export function doubleBlockParameters({ width: d, headDim }: ParameterSizes): number {
  return 36 * d ** 2 + 30 * d + 4 * headDim
}

/** Parameters outside the blocks: conditioning (three d×d layers in all, with norm_out's 2d²), embeddings and head. */
export function outerParameters({ width: d, pooled, text, patch }: ParameterSizes): number {
  return 4 * d ** 2 + (256 + pooled + text + patch + 8) * d + (d + 1) * patch
}
