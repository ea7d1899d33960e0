import { createHash } from 'node:crypto'
import { open, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import type { PipelineSource } from '../pipeline.ts'

const SAMPLE = 65_536
const SAMPLES = 16
const SMALL = SAMPLE * SAMPLES

/**
 * A hash that tells models apart without reading gigabytes: of every file of the networks, tokenizers and settings that
 * a pipeline uses its name and size, and its bytes: all of a file up to 1 MiB, else 64 KiB at each of 16 evenly spread
 * places, which takes in the headers of safetensors files. A change that misses all of these places goes unnoticed.
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

async function addFile(hash: ReturnType<typeof createHash>, name: string, path: string): Promise<void> {
  const file = await open(path).catch(() => undefined)
  if (!file) return
  try {
    const info = await file.stat()
    if (!info.isFile()) return
    const { size } = info
    hash.update(`${name} ${size}\n`)
    const buffer = Buffer.alloc(Math.min(size, SAMPLE))
    const count = size <= SMALL ? Math.ceil(size / SAMPLE) : SAMPLES
    for (let i = 0; i < count; i++) {
      const at = size <= SMALL ? i * SAMPLE : Math.floor((i * (size - SAMPLE)) / (SAMPLES - 1))
      const { bytesRead } = await file.read(buffer, 0, buffer.length, at)
      hash.update(buffer.subarray(0, bytesRead))
    }
  } finally {
    await file.close()
  }
}
