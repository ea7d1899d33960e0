import { open } from 'node:fs/promises'
import { extname } from 'node:path'
import sharp from 'sharp'
import { ioError } from './atomic.ts'
import { probeComment } from './video.ts'

const GIF_TRAILER = 0x3b
const MAX_SUB_BLOCK = 255
const MARK = 'pyraflow:'

/** JSON that survives where only ASCII does: every other character as its escape. */
export function asciiJson(value: unknown): string {
  return JSON.stringify(value).replace(
    /[\u007f-\uffff]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`,
  )
}

/** A GIF with a comment before its end. */
export function withGifComment(gif: Uint8Array, comment: string): Uint8Array {
  if (gif.at(-1) !== GIF_TRAILER) return gif
  const text = Buffer.from(MARK + comment, 'latin1')
  const blocks: Uint8Array[] = [gif.subarray(0, -1), Uint8Array.of(0x21, 0xfe)]
  for (let at = 0; at < text.length; at += MAX_SUB_BLOCK) {
    const block = text.subarray(at, at + MAX_SUB_BLOCK)
    blocks.push(Uint8Array.of(block.length), block)
  }
  return Buffer.concat([...blocks, Uint8Array.of(0, GIF_TRAILER)])
}

function gifComment(gif: Buffer): string | undefined {
  // It is the last thing in the file, and its first sub-block begins with the mark.
  let at = gif.lastIndexOf(Buffer.from(MARK, 'latin1')) - 1
  if (at < 0) return undefined
  let text = ''
  while (at < gif.length && gif[at] !== 0) {
    const length = gif[at] as number
    text += gif.toString('latin1', at + 1, at + 1 + length)
    at += 1 + length
  }
  return text.slice(MARK.length)
}

const commentOf = (json: string | undefined): string | undefined =>
  json === undefined ? undefined : (JSON.parse(json) as { comment?: string }).comment

/** The comment that a saver put inside a video or picture, or undefined. @throws ERR_IO */
export async function readEmbedded(path: string): Promise<string | undefined> {
  const ending = extname(path).toLowerCase()
  if (['.mp4', '.webm', '.mov', '.mkv'].includes(ending)) return probeComment(path)
  try {
    if (ending === '.gif') {
      const file = await open(path)
      try {
        return commentOf(gifComment(await file.readFile()))
      } finally {
        await file.close()
      }
    }
    const { exif } = await sharp(path).metadata()
    return commentOf(/\{.*\}/s.exec(exif?.toString('latin1') ?? '')?.[0])
  } catch (error) {
    throw ioError(error, 'reading', path)
  }
}
