import { join } from 'node:path'
import { setImmediate } from 'node:timers/promises'
import { engine } from './engine/engine.ts'
import { PyraflowError, throwIfAborted } from './engine/errors.ts'
import { checkTypes } from './generate/check-options.ts'
import { openWeights } from './io/safetensors.ts'
import { type AdapterChoice, openAdapters } from './lora/blend.ts'
import { type ModelFolder, surveyFolder, VAE_FOLDER } from './model-folder.ts'
import { CausalVideoVAE } from './models/causal-vae.ts'
import { loadVelocityNetwork } from './models/load-network.ts'
import type { VelocityNetwork } from './models/velocity-network.ts'
import type { PipelineParts } from './pipeline.ts'
import { residence } from './plan-folder.ts'
import { defaultCacheFolder } from './text/embedding-cache.ts'
import type { TextEncoder } from './text/encoder.ts'
import { LazyPromptEncoder } from './text/lazy-encoder.ts'
import { loadTextEncoder } from './text/load.ts'
import { textLayoutOf, textLayouts } from './text/prompt-networks.ts'

/** How to load a {@link Pipeline}. */
export interface PipelineOptions {
  /** Type of weights and activations. Default `f32`. */
  dtype?: 'f32' | 'bf16'
  /**
   * `int8`: products of the transformer's tokens in eight bits: steps some 1.5 times as fast as in bf16 and two thirds of
   * the memory, at a small loss (docs/generating.md). Needs a CPU with such products (AVX-512 VNNI, AMX).
   */
  quantize?: 'int8' | undefined
  /** Which transformer when there are several: its folder name, e.g. `diffusion_transformer_384p`, or the end of it, `384p`. */
  variant?: string
  /** Where to compute: `auto` is the best CPU level, or what the engine already runs on. Default `auto`. */
  device?: 'auto' | 'cpu' | 'cuda' | `cuda:${number}`
  /**
   * Most bytes that weights and work together may take. Text encoders are kept in memory if that fits, decoding is cut
   * into pieces that fit, the transformer's matrices are read again for every step if a video does not fit otherwise, and
   * what cannot fit is refused before it begins. Default: no limit, text encoders not kept.
   */
  maxMemory?: number
  /** Folder in which features of prompts are kept, or false for none. Default: `defaultCacheFolder()`. */
  promptCache?: string | false
  /** Is told when a prompt was cut. Default: `process.emitWarning`. */
  onWarning?: (message: string) => void
  /**
   * Low-rank adapters that generations add to the transformer unless they name others. The files are read when one
   * begins; here their headers are checked.
   */
  adapters?: readonly AdapterChoice[]
  /** Ends the loading. */
  signal?: AbortSignal
}

/**
 * Sees to it that the engine computes on this device: `auto` takes what it runs on, or will.
 * @throws ERR_DEVICE with the reason when the device is not there, or when the engine already runs on another;
 *   ERR_OPTION when there is no such device
 */
export function chooseDevice(device: string): void {
  if (device === 'auto') return
  const cuda = /^cuda(:\d+)?$/.test(device)
  if (!cuda && device !== 'cpu') {
    throw new PyraflowError('ERR_OPTION', {
      what: 'device',
      expected: 'auto, cpu, cuda or cuda:N',
      received: device,
    })
  }
  if (cuda) needCuda(device)
  if (!engine.started) engine.configure({ backend: device })
  const { backend } = engine.device
  if (backend.startsWith('cuda') === cuda) return
  throw new PyraflowError('ERR_DEVICE', {
    what: `device ${device}`,
    expected: 'the device that the engine already runs on',
    received: backend,
    remedy: 'A process, or a worker, has one device: choose it before the first tensor is made.',
  })
}

function needCuda(device: string): void {
  const { backends } = engine.info()
  const cuda = backends.find(({ name }) => name === 'cuda')
  if (cuda?.usable) return
  throw new PyraflowError('ERR_DEVICE', {
    what: `device ${device}`,
    expected: 'a CUDA backend',
    received: cuda?.reason || `none in this build, which has ${backends.map(({ name }) => name).join(', ')}`,
    remedy: "Use device: 'cpu' or 'auto'.",
  })
}

/** The parts of the pipeline in a model folder. @throws as `Pipeline.load` */
export async function loadParts(dir: string, options: PipelineOptions): Promise<PipelineParts> {
  const { dtype = 'f32', quantize, device = 'auto', adapters = [], signal } = options
  checkOptions(options)
  chooseDevice(device)
  const folder = surveyFolder(dir, options)
  await checkHeaders(folder, signal)
  const { keep, offload } = await residence(folder, options)
  const text = await openText(folder, { ...options, dtype }, keep)
  let transformer: VelocityNetwork | undefined
  try {
    transformer = await loadVelocityNetwork(join(dir, folder.variant), { dtype, quantize, signal, offload })
    checkWidths(dir, text, transformer)
    await openAdapters(transformer, adapters)
    const vae = await CausalVideoVAE.fromPretrained(join(dir, VAE_FOLDER), { dtype, signal })
    const { config, variant } = folder
    const { maxMemory } = options
    return { transformer, vae, text, config, dtype, quantize, source: { dir, variant }, maxMemory, adapters }
  } catch (error) {
    transformer?.dispose()
    text.dispose?.()
    throw error
  }
}

function checkOptions({ dtype, quantize, maxMemory, adapters }: PipelineOptions): void {
  checkTypes({ adapters })
  if (dtype !== undefined && dtype !== 'f32' && dtype !== 'bf16') {
    throw new PyraflowError('ERR_OPTION', { what: 'dtype', expected: 'f32 or bf16', received: String(dtype) })
  }
  if (quantize !== undefined && quantize !== 'int8') {
    throw new PyraflowError('ERR_OPTION', {
      what: 'quantize',
      expected: 'int8 or nothing',
      received: String(quantize),
    })
  }
  if (maxMemory === undefined || (Number.isFinite(maxMemory) && maxMemory > 0)) return
  throw new PyraflowError('ERR_OPTION', {
    what: 'maxMemory',
    expected: 'a positive number of bytes',
    received: String(maxMemory),
  })
}

/** The folders of a model that hold weights. */
export function weightFolders({ dir, variant, published }: ModelFolder): string[] {
  const names = [variant, VAE_FOLDER]
  if (published) {
    const { clip, t5 } = textLayouts[textLayoutOf(dir)]
    names.push(...[...clip, t5].map((suffix) => `text_encoder${suffix}`))
  }
  return names.map((name) => join(dir, name))
}

// All files are looked at before the first is read: whoever lacks a shard should not wait for the others to learn it.
async function checkHeaders(folder: ModelFolder, signal: AbortSignal | undefined): Promise<void> {
  for (const path of weightFolders(folder)) {
    throwIfAborted(signal, 'loading')
    openWeights(path)
    await setImmediate()
  }
}

async function openText(
  { dir, published }: ModelFolder,
  options: PipelineOptions & { dtype: 'f32' | 'bf16' },
  keep: boolean,
): Promise<TextEncoder> {
  if (!published) return loadTextEncoder(dir)
  const { dtype, promptCache: cache = defaultCacheFolder(), onWarning } = options
  return new LazyPromptEncoder(dir, { dtype, cache, keep, ...(onWarning && { onWarning }) })
}

function checkWidths(dir: string, text: TextEncoder, { config }: VelocityNetwork): void {
  const [joint, pooled] = [config.joint_attention_dim, config.pooled_projection_dim]
  if (text.jointDim === joint && text.pooledDim === pooled) return
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: `model folder ${dir}: width of text features`,
    expected: `${joint} and ${pooled} (joint and pooled), which the transformer takes`,
    received: `${text.jointDim} and ${text.pooledDim}`,
    remedy: 'Check that transformer and text encoders belong to one model.',
  })
}
