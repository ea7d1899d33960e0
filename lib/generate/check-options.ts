import { PyraflowError } from '../engine/errors.ts'
import { nearestName } from '../io/nearest-name.ts'

type Check = (value: unknown) => boolean
interface Rule {
  expected: string
  holds: Check
}

const number: Check = (v) => typeof v === 'number' && Number.isFinite(v)
const count: Check = (v) => Number.isSafeInteger(v) && (v as number) >= 1
const bytes: Check = (v) => v instanceof Uint8Array
const object = (v: unknown): v is Record<string, unknown> => typeof v === 'object' && v !== null
const list =
  (each: Check): Check =>
  (v) =>
    Array.isArray(v) && v.every(each)
const text: Check = (v) => typeof v === 'string'
const raw = (key: string, v: unknown): boolean =>
  object(v) && bytes(v[key]) && count(v.width) && count(v.height)

const size: Rule = { expected: 'a whole number of pixels', holds: count }
const scale: Rule = { expected: 'a number', holds: number }
const steps: Rule = {
  expected: 'a whole number, or a list of them',
  holds: (v) => count(v) || list(number)(v),
}
const anything: Rule = { expected: 'anything', holds: () => true }

// Names of a recipe are known, too: a recipe is an option set.
const RULES: Record<string, Rule> = {
  prompt: { expected: 'a string or a list of them', holds: (v) => text(v) || list(text)(v) },
  promptChanges: {
    expected: 'a list of { from, prompt } with seconds from 0',
    holds: list((v) => object(v) && number(v.from) && (v.from as number) >= 0 && text(v.prompt)),
  },
  negativePrompt: { expected: 'a string', holds: text },
  videosPerPrompt: { expected: 'a whole number from 1', holds: count },
  width: size,
  height: size,
  seconds: { expected: 'a positive number of seconds', holds: (v) => number(v) && (v as number) > 0 },
  frames: { expected: 'a whole number of frames from 1', holds: count },
  image: {
    expected: 'a path, the bytes of a picture or { data, width, height }',
    holds: (v) => text(v) || bytes(v) || raw('data', v),
  },
  continueFrom: {
    expected: 'a video, latents, a recipe, a path or { frames, width, height }',
    holds: (v) =>
      text(v) ||
      raw('frames', v) ||
      (object(v) && (text(v.prompt) || (v.data instanceof Float32Array && list(count)(v.shape)))),
  },
  seed: {
    expected: 'a whole number from 0 that leaves room for the videos after it',
    holds: (v) => Number.isSafeInteger(v) && (v as number) >= 0 && (v as number) < 2 ** 52,
  },
  steps,
  videoSteps: steps,
  guidanceScale: scale,
  videoGuidanceScale: scale,
  guidance: {
    expected: 'a list of numbers, one a unit, or a function of the unit',
    holds: (v) => typeof v === 'function' || (list(number)(v) && (v as []).length > 0),
  },
  linearGuidance: {
    expected: '{ alpha, min }, both numbers',
    holds: (v) => object(v) && [v.alpha, v.min].every((n) => n === undefined || number(n)),
  },
  guidanceStop: {
    expected: 'a share of the steps, 0 to 1',
    holds: (v) => number(v) && (v as number) >= 0 && (v as number) <= 1,
  },
  historyWindow: { expected: 'a whole number of units from 1', holds: count },
  historyCache: { expected: 'a whole number of steps from 1', holds: count },
  adapters: {
    expected: 'a list of { path, scale } with numbers as scales',
    holds: list((v) => object(v) && text(v.path) && (v.scale === undefined || number(v.scale))),
  },
  resume: { expected: 'the path of a folder', holds: (v) => text(v) && v !== '' },
  previews: { expected: 'a boolean', holds: (v) => typeof v === 'boolean' },
  allowUntrained: { expected: 'a boolean', holds: (v) => typeof v === 'boolean' },
  maxMemory: { expected: 'a positive number of bytes', holds: number },
  signal: { expected: 'an AbortSignal', holds: (v) => v instanceof AbortSignal },
  fps: anything,
  dtype: anything,
  quantize: anything,
  model: anything,
  backend: anything,
}

/** @throws ERR_OPTION naming an option that does not exist, or whose value is of the wrong kind. */
export function checkTypes(options: object): void {
  for (const [name, value] of Object.entries(options)) {
    if (value === undefined) continue
    const rule = Object.hasOwn(RULES, name) ? RULES[name] : undefined
    if (!rule) {
      throw new PyraflowError('ERR_OPTION', {
        what: `option ${name}`,
        expected: `a known name, such as ${nearestName(name, Object.keys(RULES))}`,
        received: name,
      })
    }
    if (rule.holds(value)) continue
    throw new PyraflowError('ERR_OPTION', { what: name, expected: rule.expected, received: shown(value) })
  }
  // A recipe cannot hold what was given in memory, only its hash.
  for (const name of ['image', 'continueFrom']) {
    const value = (options as Record<string, unknown>)[name]
    if (typeof value !== 'string' || !value.startsWith('sha256:')) continue
    throw new PyraflowError('ERR_OPTION', {
      what: name,
      expected: 'what the recipe was made with, given again',
      received: value,
      remedy: `Pass generate({ ...recipe, ${name}: … }).`,
    })
  }
}

function shown(value: unknown): string {
  if (typeof value === 'function') return 'a function'
  if (ArrayBuffer.isView(value)) return value.constructor.name
  try {
    return (JSON.stringify(value) ?? String(value)).slice(0, 80)
  } catch {
    return typeof value
  }
}
