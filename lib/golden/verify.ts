import { existsSync, readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { engine } from '../engine/engine.ts'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { readCase } from './recorded.ts'
import type { CaseRunner, Check } from './types.ts'

export type { Check } from './types.ts'

/** How one recorded case went. `f32-only`: it records nothing that could be compared in bf16. */
export type CaseStatus = 'passed' | 'failed' | 'unsupported' | 'f32-only'

export interface CaseResult {
  readonly name: string
  readonly status: CaseStatus
  /** The kind of case. */
  readonly kind: string
  /** Of the check that came nearest to its tolerance, or went farthest beyond it. */
  readonly error: number
  readonly tolerance: number
  /** That check's name; for a case that threw, the message. */
  readonly worst: string
  readonly checks: readonly Check[]
  readonly seconds: number
}

export interface VerifyOptions {
  readonly dtype?: 'f32' | 'bf16' | undefined
  /** Only cases whose folder name contains this. */
  readonly filter?: string | undefined
  readonly signal?: AbortSignal | undefined
  /** Called as each case ends. */
  readonly onCase?: ((result: CaseResult) => void) | undefined
}

interface Kind {
  readonly name: string
  readonly load: () => Promise<CaseRunner>
}

// biome-ignore lint/suspicious/noExplicitAny: every kind of case has a JSON layout of its own
type CaseJson = any

// The first entry that recognises a case runs it; the content decides where it can, so that folders named otherwise work.
const KINDS: readonly (Kind & { readonly is: (json: CaseJson, name: string) => boolean })[] = [
  {
    name: 'schedule',
    is: (json, name) => name.startsWith('scheduler') || json.step_chains !== undefined,
    load: async () => (await import('./cases-numbers.ts')).runScheduler,
  },
  {
    name: 'latent pyramid',
    is: (json, name) => name.startsWith('pyramid') || /^spatial pyramid/.test(json.what),
    load: async () => (await import('./cases-numbers.ts')).runPyramid,
  },
  {
    name: 'stage jump',
    is: (json, name) => name.startsWith('stage_jump') || /^re-noising/.test(json.what),
    load: async () => (await import('./cases-numbers.ts')).runStageJump,
  },
  {
    name: 'block noise',
    is: (json, name) => name.startsWith('block_noise') || json.gammas !== undefined,
    load: async () => (await import('./cases-numbers.ts')).runBlockNoise,
  },
  {
    name: 'history',
    is: (json, name) =>
      name.startsWith('history') || (json.plan !== undefined && json.config?.mode !== undefined),
    load: async () => (await import('./cases-numbers.ts')).runHistory,
  },
  {
    name: 'token layout',
    is: (json, name) => name.startsWith('rope_ids_masks') || /attention masks of merge_input/.test(json.what),
    load: async () => (await import('./cases-numbers.ts')).runLayout,
  },
  {
    name: 'unit lengths',
    is: (json, name) =>
      name.startsWith('train_stage_lengths') || json.table?.[0]?.first_four_calls !== undefined,
    load: async () => (await import('./cases-numbers.ts')).runStageLengths,
  },
  {
    name: 'training pairs',
    is: (json, name) => name.startsWith('train_noise') || /^construction of training inputs/.test(json.what),
    load: async () => (await import('./cases-train.ts')).runPairs,
  },
  {
    name: 'learning rates',
    is: (json, name) => name.startsWith('train_lr') || json.what === 'learning-rate tables',
    load: async () => (await import('./cases-train.ts')).runLearningRates,
  },
  {
    name: 'text encoders',
    is: (json, name) => name.startsWith('text') || /text conditioning/.test(json.what),
    load: async () => (await import('./cases-text.ts')).runTextCase,
  },
  {
    name: 'VAE losses',
    is: (json) => json.logs !== undefined && json.config?.disc_start !== undefined,
    load: async () => (await import('./cases-loss.ts')).runVaeLoss,
  },
  {
    name: 'discriminator',
    is: (json) => json.config?.n_layers !== undefined && json.config?.ndf !== undefined,
    load: async () => (await import('./cases-loss.ts')).runDiscriminator,
  },
  {
    name: 'LPIPS',
    is: (json, name) => name.startsWith('loss_lpips') || /^LPIPS/.test(json.what),
    load: async () => (await import('./cases-loss.ts')).runLpips,
  },
  {
    name: 'training objective',
    is: (json, name) => name.startsWith('train_loss') || /training objective/.test(json.what),
    load: async () => (await import('./cases-train.ts')).runTrainLoss,
  },
  {
    name: 'AdamW',
    is: (json, name) => name.startsWith('train_adamw') || json.config?.lr_per_step !== undefined,
    load: async () => (await import('./cases-train.ts')).runAdamW,
  },
  {
    name: 'DiT',
    is: (json, name) => name.startsWith('dit_') || /^Pyramid(FluxTransformer|DiffusionMMDiT)/.test(json.what),
    load: async () => (await import('./cases-dit.ts')).runDitCase,
  },
  {
    name: 'tiled VAE',
    is: (json, name) => name.includes('tiled') || json.tile_sample_min_size !== undefined,
    load: async () => (await import('./cases-vae.ts')).runVaeTiled,
  },
  {
    name: 'VAE encode',
    is: (json) => json.what === 'causal VAE encode',
    load: async () => (await import('./cases-vae.ts')).runVaeEncode,
  },
  {
    name: 'VAE decode',
    is: (json) => json.what === 'causal VAE decode',
    load: async () => (await import('./cases-vae.ts')).runVaeDecode,
  },
  {
    name: 'VAE gradients',
    is: (json) => /^VAE training forward and gradients/.test(json.what),
    load: async () => (await import('./cases-vae.ts')).runVaeGrad,
  },
  {
    name: 'generation',
    is: (json, name) => name.startsWith('e2e') || /^end-to-end/.test(json.what),
    load: async () => (await import('./cases-e2e.ts')).runGeneration,
  },
]

/**
 * Runs every recorded case (a sub-folder with a case.json) through the public API and compares the numbers.
 * Cases of an unknown kind are reported as `unsupported`, a case that throws as `failed`.
 *
 * @throws PyraflowError `ERR_IO` when the folder cannot be read or holds no case; `ERR_ABORTED`.
 */
export async function verifyFolder(dir: string, options: VerifyOptions = {}): Promise<CaseResult[]> {
  const results: CaseResult[] = []
  for (const name of caseNames(dir)) {
    if (options.filter !== undefined && !name.includes(options.filter)) continue
    throwIfAborted(options.signal, 'verify')
    const result = await runCase(join(dir, name), name, options.dtype ?? 'f32')
    results.push(result)
    options.onCase?.(result)
  }
  return results
}

function caseNames(dir: string): string[] {
  let names: string[]
  try {
    names = readdirSync(dir).filter((name) => statSync(join(dir, name)).isDirectory())
  } catch (cause) {
    throw new PyraflowError('ERR_IO', {
      what: `golden folder ${dir}`,
      expected: 'a folder of recorded cases',
      received: cause instanceof Error ? cause.message : String(cause),
      remedy: 'Give a folder like test/golden.',
      cause,
    })
  }
  const cases = names.filter((name) => existsSync(join(dir, name, 'case.json'))).sort()
  if (cases.length > 0) return cases
  throw new PyraflowError('ERR_IO', {
    what: `golden folder ${dir}`,
    expected: 'sub-folders with a case.json',
    received: 'none',
    remedy: 'Give a folder like test/golden.',
  })
}

async function runCase(dir: string, name: string, dtype: 'f32' | 'bf16'): Promise<CaseResult> {
  const began = performance.now()
  let kind = 'unknown'
  const done = (status: CaseStatus, worst: Check, checks: readonly Check[]): CaseResult => ({
    name,
    kind,
    status,
    error: worst.error,
    tolerance: worst.tolerance,
    worst: worst.name,
    checks,
    seconds: (performance.now() - began) / 1000,
  })
  try {
    const json = readCase(dir)
    const found = KINDS.find((k) => k.is({ what: '', ...json }, json.case ?? name))
    kind = found?.name ?? kind
    if (!found) return done('unsupported', { name: kind, error: Number.NaN, tolerance: Number.NaN }, [])
    const runner = await found.load()
    const checks = await runner(dir, json, { dtype })
    await engine.idle()
    if (checks.length === 0)
      return done('f32-only', { name: '', error: Number.NaN, tolerance: Number.NaN }, checks)
    const worst = checks.reduce((a, b) => (badness(b) > badness(a) ? b : a))
    const passed = checks.every((check) => check.error <= check.tolerance)
    return done(passed ? 'passed' : 'failed', worst, checks)
  } catch (error) {
    // The queue may hold more errors of this case; the next one begins clean.
    await engine.idle().catch(() => undefined)
    const message = error instanceof Error ? error.message : String(error)
    return done('failed', { name: message, error: Number.POSITIVE_INFINITY, tolerance: 0 }, [])
  }
}

// How near a check is to failing; for exact checks any error is beyond all measure.
function badness({ error, tolerance }: Check): number {
  if (!(error <= tolerance))
    return tolerance > 0 && Number.isFinite(error) ? error / tolerance : Number.MAX_VALUE
  return tolerance > 0 ? error / tolerance : 0
}
