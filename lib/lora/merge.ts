import { constants, existsSync } from 'node:fs'
import { copyFile, mkdir, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { PyraflowError, throwIfAborted } from '../engine/errors.ts'
import { ioError, writeAtomically } from '../io/atomic.ts'
import { writePretrained } from '../io/pretrained.ts'
import { openWeights, type TensorToWrite } from '../io/safetensors.ts'
import { surveyFolder } from '../model-folder.ts'
import { loadVelocityNetwork } from '../models/load-network.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import { readAs, tensorsToWrite } from '../nn/export.ts'
import type { ComputeType } from '../nn/weights.ts'
import { cast } from '../ops/cast.ts'
import { matmul } from '../ops/matmul.ts'
import { add } from '../ops/pointwise.ts'
import { keep, scope } from '../tensor/scope.ts'
import { noGrad } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'
import { type AdapterChoice, openAdapters, type Pair, pairsOf } from './blend.ts'

/** W + B·A in f32, in the type W has; the caller disposes it. */
function mergedWeight(weight: Tensor, { a, b, rank, inputs, outputs }: Pair): Tensor {
  return noGrad(() =>
    keep(
      scope(() => {
        const product = matmul(Tensor.from(b, [outputs, rank]), Tensor.from(a, [rank, inputs]))
        return cast(add(cast(weight, 'f32'), product), weight.dtype)
      }),
    ),
  )
}

/**
 * Writes a copy of a model folder whose transformer has adapters added to its weights, computed in f32 and stored in the
 * type that they have (f16 and f64 become f32). The other transformers of the folder are left out. The folder appears
 * under its name when it is complete. Merging the same adapters with the negative scale takes them away again, up to
 * rounding.
 *
 * @throws ERR_CHECKPOINT for a model folder or an adapter that is none, or that do not fit; ERR_IO when `out` is there
 * already or cannot be written; ERR_ABORTED
 */
export async function mergeAdapters(
  model: string,
  adapters: readonly AdapterChoice[],
  out: string,
  options: { variant?: string | undefined; signal?: AbortSignal | undefined } = {},
): Promise<void> {
  const { signal } = options
  const { variant } = surveyFolder(model, options)
  await writeModelFolder(out, { base: model, variant, signal }, async (dir) => {
    const source = join(model, variant)
    const dtype = storedType(source)
    const network = await loadVelocityNetwork(source, { dtype, pack: false, signal })
    try {
      const opened = await openAdapters(network, adapters)
      const named = opened.map(({ file: { hash }, scale }) => ({ hash, scale }))
      const metadata = { adapters: JSON.stringify(named) }
      const pairs = new Map(pairsOf(opened))
      await writePretrained(dir, network.modelConfig(), mergedTensors(network, pairs, dtype), {
        metadata,
        signal,
      })
    } finally {
      network.dispose()
    }
  })
}

function storedType(folder: string): ComputeType {
  const types = new Set([...openWeights(folder).entries.values()].map(({ dtype }) => dtype))
  return types.has('BF16') ? 'bf16' : 'f32'
}

// Each merged when its turn to be written comes, so that one of them is in memory at a time.
function mergedTensors(
  network: VelocityNetwork,
  pairs: ReadonlyMap<string, () => Pair>,
  dtype: ComputeType,
): TensorToWrite[] {
  const merged = Array.from(network.parameters, ([key, tensor]): TensorToWrite => {
    const [plain] = tensorsToWrite([[key, tensor]], dtype) as [TensorToWrite]
    const read = pairs.get(key.replace(/\.weight$/, ''))
    if (!read || !key.endsWith('.weight')) return plain
    const data = async (): Promise<ArrayBufferView> => {
      const sum = mergedWeight(tensor, read())
      try {
        return await readAs(sum, dtype)
      } finally {
        sum.dispose()
      }
    }
    return { ...plain, data }
  })
  return [...tensorsToWrite(network.buffers), ...merged]
}

/**
 * Writes a model folder that differs from another one in its transformer alone, which `write` puts into the folder it is
 * given. It appears under its name when it is complete.
 *
 * @throws ERR_IO when `out` is there already, or cannot be written; ERR_ABORTED; what `write` throws
 */
export async function writeModelFolder(
  out: string,
  from: { base: string; variant: string; signal?: AbortSignal | undefined },
  write: (dir: string) => Promise<void>,
): Promise<void> {
  const { base, variant, signal } = from
  if (existsSync(out)) {
    throw new PyraflowError('ERR_IO', {
      what: `model folder ${out}`,
      expected: 'a name that is free',
      received: 'a file or folder of that name',
      remedy: 'Choose another name, or remove it.',
    })
  }
  await writeAtomically(out, async (temporary) => {
    await mkdir(temporary, { recursive: true })
    await write(join(temporary, variant))
    for (const name of await readdir(base)) {
      if (/^(pyraflow\.json|causal_video_vae|text_encoder|tokenizer)/.test(name)) {
        await copyTree(join(base, name), join(temporary, name), signal)
      }
    }
  })
}

async function copyTree(from: string, to: string, signal: AbortSignal | undefined): Promise<void> {
  throwIfAborted(signal, 'copying a model folder')
  let names: string[]
  try {
    names = await readdir(from)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOTDIR') throw ioError(error, 'reading', from)
    // Shares the blocks where the file system can.
    return copyFile(from, to, constants.COPYFILE_FICLONE)
  }
  await mkdir(to, { recursive: true })
  for (const name of names) await copyTree(join(from, name), join(to, name), signal)
}
