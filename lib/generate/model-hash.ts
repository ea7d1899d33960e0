import { createHash } from 'node:crypto'
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { addFile } from '../io/fingerprint.ts'
import type { PipelineSource } from '../pipeline.ts'

/**
 * A hash that tells models apart without reading gigabytes: of every file of the networks, tokenizers and settings that
 * a pipeline uses what {@link addFile} looks at.
 */
export async function modelHash({ dir, variant }: PipelineSource): Promise<string> {
  const hash = createHash('sha256')
  const folders = (await readdir(dir, { withFileTypes: true }))
    .map(({ name }) => name)
    .filter((name) => name === variant || /^(causal_video_vae|text_encoder|tokenizer)/.test(name))
  const paths = ['pyraflow.json']
  for (const folder of folders.sort()) {
    const names = (await readdir(join(dir, folder))).filter((name) => !name.startsWith('.')).sort()
    paths.push(...names.map((name) => `${folder}/${name}`))
  }
  for (const path of paths) await addFile(hash, path.replace(variant, 'transformer'), join(dir, path))
  return hash.digest('hex').slice(0, 32)
}
