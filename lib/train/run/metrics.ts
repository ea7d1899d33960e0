import { createReadStream } from 'node:fs'
import { type FileHandle, open, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { ioError } from '../../io/atomic.ts'
import type { NotedEvent } from './events.ts'

/** Where a run notes its steps. */
export const metricsPath = (out: string): string => join(out, 'metrics.jsonl')

/** A line of metrics.jsonl; JSON has no NaN, so a number that is not finite is null. */
export type NotedLine = { readonly type: NotedEvent['type']; readonly step: number } & Readonly<
  Record<string, unknown>
>

/**
 * The lines of a metrics file with the byte at which each ends, read piece by piece; ends before the first line that is
 * none, as a kill may leave it. A file that is not there has no lines.
 * @throws ERR_IO
 */
export async function* readMetrics(path: string): AsyncGenerator<{ line: NotedLine; end: number }> {
  let rest: Buffer = Buffer.alloc(0)
  let end = 0
  try {
    for await (const chunk of createReadStream(path, { highWaterMark: 32 << 10 })) {
      rest = Buffer.concat([rest, chunk as Buffer])
      for (let at = rest.indexOf(10); at >= 0; at = rest.indexOf(10)) {
        const line = parsed(rest.subarray(0, at).toString('utf8'))
        if (!line) return
        end += at + 1
        rest = rest.subarray(at + 1)
        yield { line, end }
      }
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw ioError(error, 'read metrics', path)
  }
}

function parsed(text: string): NotedLine | undefined {
  try {
    const value = JSON.parse(text) as Partial<NotedLine> | null
    return typeof value?.type === 'string' && Number.isFinite(value.step) ? (value as NotedLine) : undefined
  } catch {
    return undefined
  }
}

/** metrics.jsonl of a run, open for appending. */
export class Metrics {
  readonly #file: FileHandle
  readonly #path: string
  /** What the step that the run continues from has noted already. */
  readonly begun: ReadonlySet<string>

  private constructor(path: string, file: FileHandle, begun: ReadonlySet<string>) {
    this.#path = path
    this.#file = file
    this.begun = begun
  }

  /**
   * Opens the file of a run that goes on after `step` (0: begins). What a killed run noted behind its last checkpoint
   * is cut off, because those steps are done, and noted, again.
   * @throws ERR_IO
   */
  static async open(out: string, step: number): Promise<Metrics> {
    const path = metricsPath(out)
    const begun = new Set<string>()
    try {
      if (step > 0) {
        let kept = 0
        for await (const { line, end } of readMetrics(path)) {
          if (line.step > step) break
          if (line.step === step) begun.add(line.type)
          kept = end
        }
        await truncate(path, kept).catch((error: NodeJS.ErrnoException) => {
          if (error.code !== 'ENOENT') throw error
        })
      }
      return new Metrics(path, await open(path, step > 0 ? 'a' : 'w'), begun)
    } catch (error) {
      throw ioError(error, 'write metrics', path)
    }
  }

  /** @throws ERR_IO */
  async note(event: NotedEvent): Promise<void> {
    await this.#try(() => this.#file.appendFile(`${JSON.stringify(event)}\n`))
  }

  /** Waits until everything noted is on the disk: a checkpoint must not outlive the history before it. @throws ERR_IO */
  async sync(): Promise<void> {
    await this.#try(() => this.#file.sync())
  }

  async close(): Promise<void> {
    await this.#file.close()
  }

  async #try(work: () => Promise<void>): Promise<void> {
    try {
      await work()
    } catch (error) {
      throw ioError(error, 'write metrics', this.#path)
    }
  }
}
