import { readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'

/** Where the weights of a model folder are: one safetensors file, or an index naming several. */
export interface WeightsLocation {
  readonly path: string
  readonly sharded: boolean
}

// In the order in which the published folders are searched: diffusers names, then transformers names.
const stems = ['diffusion_pytorch_model', 'model']

/**
 * Finds the weight file of a diffusers-style model folder: `diffusion_pytorch_model.safetensors`,
 * `model.safetensors` or their `.safetensors.index.json`; failing these, the only safetensors file there.
 *
 * @throws PyraflowError `ERR_IO` when the folder cannot be read, `ERR_CHECKPOINT` when it holds no
 * safetensors weights or several unrelated ones. Pickled `.bin` and `.pt` files are refused: reading
 * them means running code from the file.
 */
export function findWeights(folder: string): WeightsLocation {
  const { path, sharded } = pickWeights(listFolder(folder), folder)
  return { path: join(folder, path), sharded }
}

/** {@link findWeights} among the names of a folder's files, which may lie elsewhere; `path` is one of them. */
export function pickWeights(names: readonly string[], folder: string): WeightsLocation {
  for (const stem of stems) {
    for (const [suffix, sharded] of [
      ['.safetensors', false],
      ['.safetensors.index.json', true],
    ] as const) {
      if (names.includes(stem + suffix)) return { path: stem + suffix, sharded }
    }
  }
  const indexes = names.filter((name) => name.endsWith('.safetensors.index.json'))
  const files = names.filter((name) => name.endsWith('.safetensors') && !name.startsWith('.'))
  if (indexes.length === 1) return { path: indexes[0] as string, sharded: true }
  if (indexes.length === 0 && files.length === 1) return { path: files[0] as string, sharded: false }
  const pickled = names.filter((name) => /\.(bin|pt|pth|ckpt)$/.test(name))
  if (files.length === 0 && pickled.length > 0) {
    const name = pickled[0]
    const target = `${name.replace(/\.[^.]+$/, '').replace(/^pytorch_model/, 'model')}.safetensors`
    throw new PyraflowError('ERR_CHECKPOINT', {
      what: `weights in ${folder}`,
      expected: 'a .safetensors file',
      received: `${name}, a pickle whose loading would run code from the file`,
      remedy:
        'Convert it once in a Python you trust: python -c "import torch, safetensors.torch as s; ' +
        `s.save_file({k: v.contiguous() for k, v in torch.load('${name}', weights_only=True).items()}, ` +
        `'${target}')"`,
    })
  }
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: `weights in ${folder}`,
    expected: `${stems.map((stem) => `${stem}.safetensors`).join(', ')} or an index of shards`,
    received: files.length + indexes.length > 0 ? [...indexes, ...files].join(', ') : 'no safetensors file',
    remedy: 'Name the file itself, or complete the download of this folder.',
  })
}

function listFolder(folder: string): string[] {
  try {
    if (!statSync(folder).isDirectory()) {
      throw new PyraflowError('ERR_IO', {
        what: `model folder ${folder}`,
        expected: 'a folder',
        received: 'a file',
        remedy: 'Give the folder that holds config.json and the weights.',
      })
    }
    return readdirSync(folder).sort()
  } catch (error) {
    if (error instanceof PyraflowError) throw error
    throw new PyraflowError('ERR_IO', {
      what: `model folder ${folder}`,
      expected: 'a readable folder',
      received: error instanceof Error ? error.message : String(error),
      remedy: 'Check the path and its permissions.',
      cause: error,
    })
  }
}
