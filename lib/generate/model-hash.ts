import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { fingerprint, visible } from '../io/fingerprint.ts'
import type { PipelineSource } from '../pipeline.ts'

/**
 * A hash that tells models apart without reading gigabytes: of every file of the networks, tokenizers and settings that
 * a pipeline uses what {@link fingerprint} looks at.
 */
export async function modelHash({ dir, variant }: PipelineSource): Promise<string> {
  const folders = (await readdir(dir, { withFileTypes: true }))
    .map(({ name }) => name)
    .filter((name) => name === variant || /^(causal_video_vae|text_encoder|tokenizer)/.test(name))
  const paths = ['pyraflow.json']
  for (const folder of folders.sort()) {
    paths.push(...(await visible(join(dir, folder))).map((name) => `${folder}/${name}`))
  }
  return fingerprint(paths.map((path) => [path.replace(variant, 'transformer'), join(dir, path)]))
}
