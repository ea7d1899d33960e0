import { type Command, InvalidArgumentError } from 'commander'
import { z } from 'zod'
import type { OnBad } from '../train/bad-items.ts'
import type { Bucket } from '../train/buckets.ts'
import { UsageError } from './console.ts'
import { anyNumber, option, wholeNumber } from './settings.ts'

/** Settings of everything that reads clips of several sizes. */
export const dataSettings: {
  width: z.ZodOptional<z.ZodInt>
  height: z.ZodOptional<z.ZodInt>
  frames: z.ZodOptional<z.ZodInt>
  buckets: z.ZodOptional<
    z.ZodArray<z.ZodObject<{ width: z.ZodInt; height: z.ZodInt; frames: z.ZodInt }, z.core.$strict>>
  >
  fps: z.ZodOptional<z.ZodNumber>
  short: z.ZodDefault<z.ZodEnum<{ reject: 'reject'; repeat: 'repeat' }>>
  dtype: z.ZodDefault<z.ZodEnum<{ f32: 'f32'; bf16: 'bf16' }>>
} = {
  width: z.int().positive().optional(),
  height: z.int().positive().optional(),
  frames: z.int().positive().optional(),
  buckets: z
    .array(
      z.strictObject({
        width: z.int().positive(),
        height: z.int().positive(),
        frames: z.int().positive(),
      }),
    )
    .min(1)
    .optional(),
  fps: z.number().positive().optional(),
  short: z.enum(['reject', 'repeat']).default('reject'),
  dtype: z.enum(['f32', 'bf16']).default('f32'),
}

/** Flags whose settings have another name. */
export const dataFlags: Readonly<Record<string, string>> = { bucket: 'buckets' }

/** Adds the flags of {@link dataSettings}. */
export function addDataOptions(command: Command): void {
  option(command, '--width <px>', 'clips are scaled to cover this width and cropped', wholeNumber)
  option(command, '--height <px>', 'and this height', wholeNumber)
  option(command, '--frames <n>', 'frames of every clip, 1 + a multiple of 8', wholeNumber)
  option(command, '--bucket <WxHxF>', 'one of several sizes, instead; give it again for each', bucketOf)
  option(command, '--fps <n>', 'resample clips to this rate', anyNumber)
  option(command, '--short <policy>', 'clips with too few frames: reject (default) or repeat')
  option(command, '--dtype <type>', 'compute type: f32 or bf16')
}

/** `640x384x121` as a bucket, added to those before. */
function bucketOf(text: string, before: Bucket[] | undefined): Bucket[] {
  const found = /^(\d+)[x×](\d+)[x×](\d+)$/.exec(text)
  if (!found) throw new InvalidArgumentError('Expected width, height and frames, such as 640x384x121.')
  const [width, height, frames] = found.slice(1).map(Number) as [number, number, number]
  return [...(before ?? []), { width, height, frames }]
}

/** The sizes that were given, or undefined. @throws UsageError for both kinds, or half of one */
export function bucketsIn(s: {
  width?: number | undefined
  height?: number | undefined
  frames?: number | undefined
  buckets?: readonly Bucket[] | undefined
}): readonly Bucket[] | undefined {
  const { width, height, frames, buckets } = s
  const given = [width, height, frames].filter((n) => n !== undefined).length
  if (buckets) {
    if (given > 0) throw new UsageError('give either --width, --height and --frames, or --bucket')
    return buckets
  }
  if (given === 0) return undefined
  if (width === undefined || height === undefined || frames === undefined) {
    throw new UsageError('--width, --height and --frames belong together')
  }
  return [{ width, height, frames }]
}

/** `--on-bad 5` as a limit. */
export function onBadFlag(text: string): OnBad {
  if (text === 'fail' || text === 'skip') return text
  return { limit: wholeNumber(text) }
}
