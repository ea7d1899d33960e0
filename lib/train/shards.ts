import { createHash } from 'node:crypto'
import { type FileHandle, mkdir, open, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { PyraflowError } from '../engine/errors.ts'
import { ioError } from '../io/atomic.ts'
import {
  dtypeBytes,
  openSafetensors,
  type Safetensors,
  type SafetensorsDtype,
  type TensorToWrite,
  writeSafetensors,
} from '../io/safetensors.ts'

/** What is known of a row besides its tensors. */
export interface RowFacts {
  readonly [name: string]: unknown
}

/** Rows to be written. */
export interface Rows {
  readonly keys: readonly string[]
  /** Each [keys.length, …]. */
  readonly tensors: readonly TensorToWrite[]
  /** Of each row. */
  readonly facts: readonly RowFacts[]
  /** What they were made with. */
  readonly settings: RowFacts
}

interface Shard {
  readonly name: string
  readonly file: Safetensors
  readonly keys: readonly string[]
  readonly facts: readonly RowFacts[]
  /** What its rows were made with. */
  readonly settings: RowFacts
}

/** Most rows and bytes of a shard. */
export const SHARD_ROWS = 256
export const SHARD_BYTES: number = 256 * 2 ** 20

const NAME = /^[0-9a-f]{32}\.safetensors$/
const LEFT_OVER = /^\.[0-9a-f]{32}\.safetensors\..*\.tmp$/

/**
 * A folder of safetensors files whose rows are named by keys: hashes of everything that a row depends on. A new row is
 * written as a file of its own at once, so that a process may end at any moment; rows that belong together are then
 * joined. The name of a file is a hash of its keys, and its bytes depend on its rows alone.
 */
export class ShardFolder {
  readonly dir: string
  readonly #format: string
  readonly #shards = new Map<string, Shard>()
  readonly #places = new Map<string, { shard: Shard; row: number }>()

  private constructor(dir: string, format: string) {
    this.dir = dir
    this.#format = format
  }

  /**
   * Makes the folder or looks at what is in it; files that are damaged or of another format are as good as absent.
   * @throws ERR_IO
   */
  static async open(dir: string, format: string): Promise<ShardFolder> {
    const folder = new ShardFolder(dir, format)
    try {
      await mkdir(dir, { recursive: true })
      for (const name of (await readdir(dir)).sort()) {
        if (NAME.test(name)) folder.#add(name)
        await setImmediate()
      }
    } catch (error) {
      throw ioError(error, 'open cache', dir)
    }
    return folder
  }

  #add(name: string): void {
    const shard = readShard(join(this.dir, name), this.#format)
    if (!shard) return
    this.#shards.set(name, shard)
    for (const [row, key] of shard.keys.entries()) this.#places.set(key, { shard, row })
  }

  has(key: string): boolean {
    return this.#places.has(key)
  }

  /** What is known of a row that is there. */
  facts(key: string): RowFacts {
    const { shard, row } = this.#place(key)
    return shard.facts[row] as RowFacts
  }

  /** Settings with which rows were made, and how many rows. */
  settings(): { settings: RowFacts; rows: number }[] {
    const found = new Map<string, { settings: RowFacts; rows: number }>()
    for (const { settings, keys } of this.#shards.values()) {
      const text = JSON.stringify(settings)
      const known = found.get(text) ?? { settings, rows: 0 }
      found.set(text, { settings, rows: known.rows + keys.length })
    }
    return [...found.values()]
  }

  /** Bytes of a row that is there, of all its tensors. */
  rowBytes(key: string): number {
    let bytes = 0
    for (const { dtype, shape } of this.#place(key).shard.file.entries.values())
      bytes += rowSize(dtype, shape)
    return bytes
  }

  /**
   * Joins rows that are there, all made with the same settings, in a file of their own.
   * @returns the name of the file
   * @throws ERR_IO; ERR_ABORTED
   */
  async join(keys: readonly string[], signal?: AbortSignal): Promise<string> {
    const name = this.#nameOf(keys)
    if (this.#shards.has(name)) return name
    const places = keys.map((key) => this.#place(key))
    const { file, settings } = (places[0] as (typeof places)[number]).shard
    const tensors = [...file.entries].map(
      ([table, { dtype, shape }]): TensorToWrite => ({
        name: table,
        dtype,
        shape: [keys.length, ...shape.slice(1)],
        data: () => joined(places, table, rowSize(dtype, shape)),
      }),
    )
    const facts = keys.map((key) => this.facts(key))
    return await this.write({ keys, tensors, facts, settings }, signal)
  }

  /** Removes files of one row that `keep` does not name and whose rows are in another file. */
  async tidy(keys: readonly string[], keep: ReadonlySet<string>): Promise<void> {
    for (const key of keys) {
      const single = this.#nameOf([key])
      if (keep.has(single) || this.#place(key).shard.name === single) continue
      if (this.#shards.delete(single)) await rm(join(this.dir, single), { force: true })
    }
  }

  /** Removes every file but those named, and what a killed process left behind. */
  async sweep(keep: ReadonlySet<string>): Promise<void> {
    for (const name of await readdir(this.dir)) {
      if (!LEFT_OVER.test(name) && (!NAME.test(name) || keep.has(name))) continue
      await rm(join(this.dir, name), { force: true })
      this.#shards.delete(name)
    }
  }

  /**
   * Writes rows as a file of their own.
   * @returns its name
   * @throws ERR_IO; ERR_ABORTED
   */
  async write({ keys, tensors, facts, settings }: Rows, signal?: AbortSignal): Promise<string> {
    const name = this.#nameOf(keys)
    const metadata = {
      format: this.#format,
      settings: JSON.stringify(settings),
      keys: JSON.stringify(keys),
      facts: JSON.stringify(facts),
    }
    await writeSafetensors(join(this.dir, name), tensors, metadata, { signal })
    this.#add(name)
    return name
  }

  #nameOf(keys: readonly string[]): string {
    const hash = createHash('sha256').update(JSON.stringify([this.#format, ...keys]))
    return `${hash.digest('hex').slice(0, 32)}.safetensors`
  }

  #place(key: string): { shard: Shard; row: number } {
    const place = this.#places.get(key)
    if (place) return place
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: `cache ${this.dir}`,
      expected: `a row ${key}`,
      received: 'none',
      remedy: 'Encode the data set again.',
    })
  }
}

/** Rows that are joined in shards as they come, up to {@link SHARD_ROWS} and {@link SHARD_BYTES} each. */
export class Filling {
  /** The finished shards. */
  readonly files: string[] = []
  readonly #store: ShardFolder
  readonly #keep: ReadonlySet<string>
  readonly #seen = new Set<string>()
  #keys: string[] = []
  #bytes = 0

  /** @param keep - files that must stay */
  constructor(store: ShardFolder, keep: ReadonlySet<string>) {
    this.#store = store
    this.#keep = keep
  }

  /** Adds a row that is in the folder; a row that was added before is there already. @throws ERR_IO; ERR_ABORTED */
  async add(key: string, signal?: AbortSignal): Promise<void> {
    if (this.#seen.has(key)) return
    this.#seen.add(key)
    const bytes = this.#store.rowBytes(key)
    if (this.#keys.length === SHARD_ROWS || this.#bytes + bytes > SHARD_BYTES) await this.close(signal)
    this.#keys.push(key)
    this.#bytes += bytes
  }

  /** Finishes the last shard. @throws ERR_IO; ERR_ABORTED */
  async close(signal?: AbortSignal): Promise<void> {
    if (this.#keys.length === 0) return
    this.files.push(await this.#store.join(this.#keys, signal))
    await this.#store.tidy(this.#keys, this.#keep)
    this.#keys = []
    this.#bytes = 0
  }
}

/** The header of a shard, or undefined when the file is not one of this format. */
export function readShard(path: string, format: string): Shard | undefined {
  try {
    const file = openSafetensors(path)
    const { format: own, settings, keys: names, facts: about } = file.metadata
    if (own !== format) return undefined
    const keys = JSON.parse(names as string) as string[]
    const facts = JSON.parse(about as string) as RowFacts[]
    const whole = [...file.entries.values()].every(({ shape }) => shape[0] === keys.length)
    if (!whole || facts.length !== keys.length) return undefined
    const name = path.slice(path.length - 44)
    return { name, file, keys, facts, settings: JSON.parse(settings as string) as RowFacts }
  } catch {
    return undefined
  }
}

function rowSize(dtype: SafetensorsDtype, shape: readonly number[]): number {
  return shape.slice(1).reduce((n, d) => n * d, dtypeBytes[dtype])
}

async function joined(
  places: readonly { shard: Shard; row: number }[],
  table: string,
  bytes: number,
): Promise<Uint8Array> {
  const all = new Uint8Array(places.length * bytes)
  let handle: { path: string; file: FileHandle } | undefined
  try {
    for (const [i, { shard, row }] of places.entries()) {
      const entry = shard.file.entries.get(table)
      if (!entry) throw new PyraflowError('ERR_CHECKPOINT', { what: `${shard.file.path}: no ${table}` })
      if (handle?.path !== entry.file) {
        await handle?.file.close()
        handle = { path: entry.file, file: await open(entry.file) }
      }
      const target = all.subarray(i * bytes, (i + 1) * bytes)
      const { bytesRead } = await handle.file.read(target, 0, bytes, entry.begin + row * bytes)
      if (bytesRead === bytes) continue
      throw new PyraflowError('ERR_IO', {
        what: `reading ${entry.file}`,
        received: 'a file that became shorter',
      })
    }
  } catch (error) {
    throw ioError(error, 'reading', handle?.path ?? 'cache')
  } finally {
    await handle?.file.close()
  }
  return all
}
