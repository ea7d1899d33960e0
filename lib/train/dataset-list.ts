import { readdir, readFile, stat } from 'node:fs/promises'
import { dirname, extname, isAbsolute, join, relative } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import { ioError } from '../io/atomic.ts'
import type { BadItem, BadReason } from './bad-items.ts'

/** A clip or picture with its caption. */
export interface DatasetItem {
  readonly kind: 'video' | 'image'
  /** Path that can be opened from here. */
  readonly path: string
  /** The path as the data set spells it. */
  readonly name: string
  readonly text: string
  /** Whatever else the caption line held. */
  readonly extra: Readonly<Record<string, unknown>>
}

/** An entry of a data set: `item` where it can be used, as far as is known without opening the clip. */
export type Listed =
  | { readonly place: string; readonly item: DatasetItem; readonly bad?: undefined }
  | { readonly place: string; readonly item?: undefined; readonly bad: BadItem }

const VIDEOS = ['.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.gif']
const IMAGES = ['.png', '.jpg', '.jpeg', '.webp', '.avif', '.tif', '.tiff']
const CAPTIONS = 'captions.jsonl'

/** What is to be looked at, entry by entry. */
export interface DatasetList {
  readonly length: number
  at(i: number): Promise<Listed>
}

/** Where the captions of a data set stand: one JSONL, or a text file beside each clip. */
interface Source {
  readonly label: string
  readonly entries: readonly (() => Promise<Listed>)[]
}

function broken(
  reason: BadReason,
  place: string,
  details: { what: string; expected: string; received: string; remedy: string; cause?: unknown },
): Listed {
  return { place, bad: { reason, place, error: new PyraflowError('ERR_IO', details) } }
}

function badLine(reason: BadReason, place: string, received: string, cause?: unknown): Listed {
  return broken(reason, place, {
    what: `caption line ${place}`,
    expected: 'one JSON object such as {"video": "clip.mp4", "text": "a caption"}',
    received,
    remedy: 'correct or remove the line',
    cause,
  })
}

async function parseLine(line: string, place: string, folder: string): Promise<Listed> {
  let value: unknown
  try {
    value = JSON.parse(line)
  } catch (error) {
    return badLine('line', place, `text that is not JSON: ${line.slice(0, 60)}`, error)
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    return badLine('line', place, line.slice(0, 60))
  }
  const { video, image, text, ...extra } = value as Record<string, unknown>
  const name = video ?? image
  if (typeof name !== 'string' || name === '') return badLine('line', place, 'no "video" or "image" path')
  if (video !== undefined && image !== undefined) return badLine('line', place, 'both "video" and "image"')
  if (typeof text !== 'string' || text.trim() === '') {
    return badLine('caption', place, `no or an empty "text" for ${name}`)
  }
  const path = isAbsolute(name) ? name : join(folder, name)
  const info = await stat(path).catch(() => undefined)
  if (!info?.isFile()) return badLine('missing', place, `a clip that does not exist: ${path}`)
  return {
    place,
    item: { kind: video === undefined ? 'image' : 'video', path, name, text: text.trim(), extra },
  }
}

async function readLines(file: string): Promise<Source> {
  const content = await readFile(file, 'utf8').catch((error: unknown) => {
    throw ioError(error, 'reading captions', file)
  })
  const entries = content
    .replace(/^\uFEFF/, '')
    .split('\n')
    .flatMap((line, i) =>
      line.trim() === '' ? [] : [() => parseLine(line, `${file}:${i + 1}`, dirname(file))],
    )
  return { label: file, entries }
}

async function readSidecars(folder: string): Promise<Source> {
  const names = await readdir(folder, { recursive: true }).catch((error: unknown) => {
    throw ioError(error, 'reading data set', folder)
  })
  const entries = names.sort().flatMap((name) => {
    const ending = extname(name).toLowerCase()
    const kind = VIDEOS.includes(ending) ? 'video' : IMAGES.includes(ending) ? 'image' : undefined
    if (kind === undefined || /(^|[\\/])\./.test(name)) return []
    const path = join(folder, name)
    const beside = path.slice(0, path.length - ending.length).concat('.txt')
    return [
      async (): Promise<Listed> => {
        const text = await readFile(beside, 'utf8').catch(() => '')
        if (text.trim() !== '') {
          return { place: path, item: { kind, path, name, text: text.trim(), extra: {} } }
        }
        return broken('caption', path, {
          what: `caption of ${path}`,
          expected: `a text in ${relative(folder, beside)} beside it`,
          received: 'none or an empty one',
          remedy: 'write it, or move the clip elsewhere',
        })
      },
    ]
  })
  return { label: folder, entries }
}

async function sourceOf(path: string): Promise<Source> {
  const info = await stat(path).catch((error: unknown) => {
    throw ioError(error, 'reading data set', path)
  })
  if (!info.isDirectory()) return readLines(path)
  const captions = join(path, CAPTIONS)
  const listed = await stat(captions).catch(() => undefined)
  return listed?.isFile() ? readLines(captions) : readSidecars(path)
}

/**
 * The entries of a data set: of the JSONL at `path` or of `captions.jsonl` in the folder `path`, else the clips and
 * pictures below the folder in the order of their names. Each is looked at when it is asked for.
 *
 * @throws ERR_IO when there is nothing at `path`, or no entry
 */
export async function listDataset(path: string, limit?: number): Promise<DatasetList> {
  const { label, entries } = await sourceOf(path)
  if (entries.length === 0) {
    throw new PyraflowError('ERR_IO', {
      what: `data set ${label}`,
      expected: `${CAPTIONS} with a line for each clip, or videos and images with a .txt beside each`,
      received: 'no caption lines at all',
      remedy: 'check the path',
    })
  }
  const kept = limit === undefined ? entries : entries.slice(0, limit)
  return { length: kept.length, at: (i) => (kept[i] as () => Promise<Listed>)() }
}
