import { readFileSync } from 'node:fs'
import { type Command, InvalidArgumentError, Option } from 'commander'
import type { z } from 'zod'
import { nearestName } from '../io/nearest-name.ts'
import type { AdapterChoice } from '../lora/blend.ts'
import { type CommonOptions, UsageError } from './console.ts'

/** `--steps 20,20,20` as numbers. */
export function numberList(text: string): number[] {
  return text.split(',').map((part) => wholeNumber(part.trim()))
}

/** A whole number of 0 or more. */
export function wholeNumber(text: string): number {
  const value = Number(text)
  if (text !== '' && Number.isSafeInteger(value) && value >= 0) return value
  throw new InvalidArgumentError('Expected a whole number.')
}

/** Any finite number. */
export function anyNumber(text: string): number {
  const value = Number(text)
  if (text.trim() !== '' && Number.isFinite(value)) return value
  throw new InvalidArgumentError('Expected a number.')
}

/** Collects the values of a flag that is given several times. */
export function gather<T>(parse: (text: string) => T) {
  return (text: string, before: T[] = []): T[] => [...before, parse(text)]
}

/** `FILE` or `FILE:SCALE`. */
export function adapterChoice(text: string): AdapterChoice {
  const [, path, scale] = /^(.+?)(?::([-+.\de]+))?$/.exec(text) ?? []
  if (path === undefined) throw new InvalidArgumentError('Expected a file, or file:scale.')
  return { path, ...(scale === undefined ? {} : { scale: anyNumber(scale) }) }
}

/** `--prompt-text` → PYRAFLOW_PROMPT_TEXT, the environment variable of an option. */
export function variable(flags: string): string {
  const name = /--([a-z0-9-]+)/.exec(flags)?.[1] ?? ''
  return `PYRAFLOW_${name.replaceAll('-', '_').toUpperCase()}`
}

/** Adds an option that its PYRAFLOW_* variable can give as well. */
export function option<T>(
  command: Command,
  flags: string,
  about: string,
  /** Gets the text and, for a flag that is given again, what it gave before. */
  parse?: (text: string, before: T | undefined) => T,
): Command {
  const made = new Option(flags, about).env(variable(flags))
  if (parse) made.argParser(parse)
  return command.addOption(made)
}

/** Adds what a video may see of its past. */
export function historyOptions(command: Command): void {
  const cache = 'compute text and history at every n-th step of a stage only'
  option(command, '--history-cache <n>', cache, wholeNumber)
  option(command, '--history-window <n>', 'units of the past that a unit sees at most', wholeNumber)
}

/** Adds the options that every subcommand has. */
export function common(command: Command, json = true): Command {
  if (json) command.option('--json', 'print the result as one JSON object on stdout')
  command.addOption(
    new Option('--progress <mode>', 'how to show progress on stderr')
      .choices(['auto', 'plain', 'json', 'none'])
      .env('PYRAFLOW_PROGRESS')
      .default('auto'),
  )
  option(
    command,
    '--backend <name>',
    'auto, cpu, cuda, cuda:N, or a CPU level to cap at: base, avx2, avx512, avx512_bf16, amx, neon, ref',
  )
  return option(command, '--threads <n>', 'compute threads (default: all cores)', wholeNumber)
}

/** Hands backend and threads to the engine before its first use. */
export async function configureEngine(options: CommonOptions & { device?: string }): Promise<void> {
  const { engine } = await import('../engine/engine.ts')
  const backend = options.device ?? options.backend
  // The engine lets the variables win over options; here a flag must win over its variable.
  if (backend !== undefined) process.env.PYRAFLOW_BACKEND = backend
  if (options.threads !== undefined) process.env.PYRAFLOW_THREADS = String(options.threads)
  engine.configure({})
}

/**
 * The settings of a run: flag, then PYRAFLOW_* variable, then configuration file, then default. Names in the file are
 * those of the flags in camelCase.
 *
 * @throws UsageError naming every unknown key with the nearest known one, and every wrong value.
 */
export function resolveSettings<S extends z.ZodObject>(
  schema: S,
  command: Command,
  file?: string,
  /** Flags that are named otherwise than their setting. */
  renamed: Readonly<Record<string, string>> = {},
): z.output<S> {
  const known = Object.keys(schema.shape)
  const given = file === undefined ? {} : readSettings(file)
  const settings: Record<string, unknown> = { ...given }
  const flags = command.opts()
  for (const flag of [...known, ...Object.keys(renamed)]) {
    const source = command.getOptionValueSource(flag)
    if (source === 'cli' || source === 'env') settings[renamed[flag] ?? flag] = flags[flag]
  }
  const parsed = schema.safeParse(settings)
  if (parsed.success) return parsed.data
  throw new UsageError(parsed.error.issues.flatMap((issue) => describe(issue, schema)).join('; '))
}

/** The object in a configuration file. @throws UsageError when it is missing or not one. */
export function readSettings(file: string): Record<string, unknown> {
  let parsed: unknown
  try {
    parsed = JSON.parse(readFileSync(file, 'utf8'))
  } catch (error) {
    throw new UsageError(
      `configuration file ${file}: ${error instanceof Error ? error.message : String(error)}`,
    )
  }
  if (typeof parsed === 'object' && parsed !== null && !Array.isArray(parsed))
    return parsed as Record<string, unknown>
  throw new UsageError(`configuration file ${file}: expected a JSON object`)
}

function describe(issue: z.core.$ZodIssue, schema: z.ZodObject): string[] {
  const path = issue.path.join('.')
  if (issue.code !== 'unrecognized_keys') {
    const missing =
      issue.code === 'invalid_type' && issue.input === undefined && /received undefined/.test(issue.message)
    if (missing && issue.path.length === 1)
      return [`missing --${kebab(path)}, or "${path}" in the configuration file`]
    return [`${path || 'settings'}: ${issue.message}`]
  }
  let inner: unknown = schema
  for (const part of issue.path) inner = shapeOf(inner)?.[String(part)]
  const candidates = Object.keys(shapeOf(inner) ?? {})
  return issue.keys.map((key) => {
    const near = nearestName(key, candidates)
    const hint = near === undefined ? '' : `; did you mean "${near}"?`
    return `unknown setting "${path ? `${path}.` : ''}${key}"${hint}`
  })
}

// The fields of an object schema, also when it is optional.
function shapeOf(schema: unknown): Record<string, unknown> | undefined {
  let at = schema as { shape?: Record<string, unknown>; unwrap?: () => unknown } | undefined
  while (at && !at.shape && at.unwrap) at = at.unwrap() as typeof at
  return at?.shape
}

export const kebab = (name: string): string => name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)
