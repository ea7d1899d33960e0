/** Text as it may stand in SVG, between tags and in attributes. */
export function escapeXml(text: string): string {
  return text.replace(/[<>&'"]/g, (c) => `&#${c.charCodeAt(0)};`)
}

/** Fonts that most machines have one of. */
export const SANS = 'DejaVu Sans, Arial, sans-serif'

/** Draws SVG as a PNG file. Text is missing where the machine has no font. Rejects where it has no renderer. */
export async function svgToPng(svg: string): Promise<Uint8Array> {
  // A tenth of a second that only who draws pays for.
  const { default: sharp } = await import('sharp')
  return await sharp(Buffer.from(svg)).png().toBuffer()
}
