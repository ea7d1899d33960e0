import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { PyraflowError } from '../engine/errors.ts'
import { ioError, removeTemporaries } from '../io/atomic.ts'
import { writeFileAtomic } from '../io/atomic-stream.ts'

/** Beside the shards of a cache: what they hold, in the order of the data set. It is written last. */
const INDEX = 'index.jsonl'
/** The folder of the shards in that of the cache. */
export const SHARDS = 'shards'

/** First line of an index. */
export interface CacheHeader {
  readonly format: string
  /** Lines that follow. */
  readonly entries: number
  readonly shards: readonly { readonly file: string }[]
}

// Lines that are read or written before the event loop turns.
const AT_ONCE = 2000

/** Writes a header and a line for each entry, whole or not at all. @throws ERR_IO; ERR_ABORTED */
export async function writeIndex(
  dir: string,
  header: CacheHeader,
  lines: readonly object[],
  signal?: AbortSignal,
): Promise<void> {
  async function* chunks(): AsyncGenerator<Uint8Array> {
    yield Buffer.from(`${JSON.stringify(header)}\n`)
    for (let at = 0; at < lines.length; at += AT_ONCE) {
      await setImmediate()
      const text = lines.slice(at, at + AT_ONCE).map((line) => `${JSON.stringify(line)}\n`)
      yield Buffer.from(text.join(''))
    }
  }
  await writeFileAtomic(join(dir, INDEX), chunks(), { signal })
  await removeTemporaries(join(dir, INDEX))
}

/**
 * Reads what {@link writeIndex} wrote.
 *
 * @param remedy - how such a cache is made
 * @throws ERR_IO when there is none; ERR_CHECKPOINT when it is of another format or damaged
 */
export async function readIndex<H extends CacheHeader, L>(
  dir: string,
  format: string,
  remedy: string,
): Promise<{ header: H; lines: L[] }> {
  const path = join(dir, INDEX)
  const text = await readFile(path, 'utf8').catch((error: unknown) => {
    throw ioError(error, `read cache (make it with ${remedy})`, path)
  })
  try {
    const all = text.split('\n')
    const header = JSON.parse(all[0] as string) as H
    if (header.format !== format) throw new Error(`a file of format ${header.format}`)
    const lines: L[] = []
    for (const [i, line] of all.entries()) {
      if (i % AT_ONCE === 0) await setImmediate()
      if (i > 0 && line !== '') lines.push(JSON.parse(line) as L)
    }
    if (lines.length !== header.entries) throw new Error(`${lines.length} of ${header.entries} lines`)
    return { header, lines }
  } catch (error) {
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: path,
      expected: `the index of a cache (${format})`,
      received: (error as Error).message,
      remedy: `Make it again with ${remedy}: what is there is used.`,
      cause: error,
    })
  }
}

/** Files of the cache as it opens now: they stay until there is a new index. */
export async function shardsOf(dir: string, format: string): Promise<Set<string>> {
  try {
    const { header } = await readIndex(dir, format, '')
    return new Set(header.shards.map(({ file }) => file))
  } catch {
    return new Set()
  }
}
