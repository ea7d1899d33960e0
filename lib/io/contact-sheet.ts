import sharp, { type OverlayOptions } from 'sharp'
import { PyraflowError } from '../engine/errors.ts'
import { writeFileAtomically } from './atomic.ts'
import { escapeXml, SANS, svgToPng } from './svg.ts'

export interface ContactClip {
  /** u8 RGB, [T, height, width, 3]. */
  frames: Uint8Array
  width: number
  height: number
  label: string
}

export interface ContactSheetOptions {
  /** Frames shown per clip, evenly spaced from the first to the last; default 6. */
  framesPerClip?: number
  /** Clips side by side; default 1. */
  columns?: number
  /** Shown height of a frame in pixels; default the clip's own height, at most 192. */
  frameHeight?: number
}

const gap = 4
const labelHeight = 22
const background = { r: 24, g: 24, b: 27 }

/** Text as a picture; undefined where the machine has no renderer or font for it, as the frames matter more. */
async function renderLabel(text: string, width: number): Promise<Uint8Array | undefined> {
  const style = `font-family="${SANS}" font-size="13" fill="#e4e4e7"`
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${labelHeight}">
    <text x="2" y="16" ${style}>${escapeXml(text)}</text></svg>`
  return svgToPng(svg).catch(() => undefined)
}

/**
 * Writes a PNG grid: one strip of evenly spaced frames per clip under its label, for looking at many clips at once.
 *
 * @throws PyraflowError `ERR_OPTION` without clips, `ERR_SHAPE` for partial frames, `ERR_IO` naming the file
 */
export async function contactSheet(
  path: string,
  clips: readonly ContactClip[],
  options: ContactSheetOptions = {},
): Promise<void> {
  const { framesPerClip = 6, columns = 1 } = options
  if (clips.length === 0 || framesPerClip < 1 || columns < 1) {
    throw new PyraflowError('ERR_OPTION', {
      what: 'contactSheet',
      expected: 'at least one clip, one frame per clip and one column',
      received: `${clips.length} clips, ${framesPerClip} frames per clip, ${columns} columns`,
      remedy: 'give clips to show',
    })
  }
  const cells = clips.map(({ frames, width, height, label }) => {
    const count = frames.length / (width * height * 3)
    if (!Number.isInteger(count) || count < 1) {
      throw new PyraflowError('ERR_SHAPE', {
        what: `contactSheet: frames of "${label}"`,
        expected: `u8 [T, ${height}, ${width}, 3]`,
        received: `${frames.length} bytes`,
        remedy: 'give whole RGB frames of the stated width and height',
      })
    }
    const shown = options.frameHeight ?? Math.min(height, 192)
    const shownWidth = Math.max(1, Math.round((width * shown) / height))
    return { frames, width, height, label, count, shown, shownWidth, strip: Math.min(framesPerClip, count) }
  })
  const cellWidth = Math.max(...cells.map((cell) => cell.strip * (cell.shownWidth + gap)))
  const cellHeight = labelHeight + Math.max(...cells.map((cell) => cell.shown)) + gap
  const overlays: OverlayOptions[] = []
  for (const [i, cell] of cells.entries()) {
    const left = gap + (i % columns) * (cellWidth + gap)
    const top = gap + Math.floor(i / columns) * cellHeight
    const label = await renderLabel(cell.label, cellWidth)
    if (label) overlays.push({ input: label as Buffer, left, top })
    const bytes = cell.width * cell.height * 3
    for (let k = 0; k < cell.strip; ++k) {
      const at = cell.strip === 1 ? 0 : Math.round((k * (cell.count - 1)) / (cell.strip - 1))
      const raw = { width: cell.width, height: cell.height, channels: 3 as const }
      const picture = sharp(cell.frames.subarray(at * bytes, (at + 1) * bytes), { raw })
      const input = await picture.resize(cell.shownWidth, cell.shown).png().toBuffer()
      overlays.push({ input, left: left + k * (cell.shownWidth + gap), top: top + labelHeight })
    }
  }
  const width = 2 * gap + Math.min(columns, cells.length) * (cellWidth + gap)
  const height = 2 * gap + Math.ceil(cells.length / columns) * cellHeight
  const sheet = sharp({ create: { width, height, channels: 3, background } }).composite(overlays)
  await writeFileAtomically(path, await sheet.png().toBuffer())
}
