import { join } from 'node:path'
import { PyraflowError } from '../engine/errors.ts'
import type { LatentNormalisation } from '../flow/normalise.ts'
import { makeStages, type Stages } from '../flow/stages.ts'
import { folderFingerprint } from '../io/fingerprint.ts'
import { Lora, type LoraOptions } from '../lora/lora.ts'
import { writeModelFolder } from '../lora/merge.ts'
import { type ModelFolder, surveyFolder } from '../model-folder.ts'
import { loadVelocityNetwork } from '../models/load-network.ts'
import type { VelocityNetwork } from '../models/velocity-network.ts'
import type { ComputeType } from '../nn/weights.ts'
import type { ImmediateTextEncoder } from '../text/encoder.ts'
import { WordEncoder } from '../text/word-encoder.ts'
import type { LatentSource } from './latent-source.ts'
import type { Trainer, TrainerOptions } from './trainer.ts'

/** File name of a trained adapter in checkpoints and results. */
export const ADAPTER_FILE = 'adapter.safetensors'

export interface FineTuneOptions {
  /** Type computed in; masters are f32. Default `bf16`. */
  dtype?: ComputeType | undefined
  /** Which transformer when there are several, as for `Pipeline.load`. */
  variant?: string | undefined
  /** Train low-rank adapters: new ones, or those of a file. Without it all weights of the transformer are trained. */
  lora?: LoraOptions | { path: string } | undefined
  /**
   * Features of captions. Default: the folder's own encoder, where it is one that a training step can wait for; those of
   * published models are not, and their features have to be cached before.
   */
  text?: ImmediateTextEncoder | undefined
  signal?: AbortSignal | undefined
}

/** What a model folder decides of a run that goes on from it; spread into the options of a `Trainer`. */
export type FineTuneParts = Pick<
  TrainerOptions,
  'model' | 'teacher' | 'text' | 'data' | 'stages' | 'framesPerUnit' | 'parameters' | 'write'
>

/**
 * A whole model folder, published or one of ours, whose transformer is trained on: with the folder's own stages, units,
 * text encoder and normalisation constants, so that what comes out is used like what went in.
 */
export class FineTune {
  readonly folder: ModelFolder
  readonly model: VelocityNetwork
  readonly text: ImmediateTextEncoder
  readonly stages: Stages
  readonly normalisation: LatentNormalisation
  readonly framesPerUnit: number
  readonly lora: Lora | undefined
  readonly #base: VelocityNetwork
  readonly #baseHash: string

  private constructor(
    folder: ModelFolder,
    parts: { base: VelocityNetwork; baseHash: string; lora: Lora | undefined; text: ImmediateTextEncoder },
  ) {
    const { stages, normalisation, framesPerUnit = 1 } = folder.config
    this.folder = folder
    this.lora = parts.lora
    this.model = parts.lora?.network ?? parts.base
    this.text = parts.text
    this.stages = makeStages(stages)
    this.normalisation = normalisation
    this.framesPerUnit = framesPerUnit
    this.#base = parts.base
    this.#baseHash = parts.baseHash
  }

  /**
   * Loads the transformer of a model folder to train it. With `lora` its weights stay mapped where the file has the type
   * computed in, and are never written.
   *
   * @throws ERR_CHECKPOINT, ERR_IO as `Pipeline.load`; ERR_OPTION as `Lora.create`, or for a published folder without
   * `text`; ERR_ABORTED
   */
  static async open(dir: string, options: FineTuneOptions = {}): Promise<FineTune> {
    const { dtype = 'bf16', lora, signal } = options
    const folder = surveyFolder(dir, options)
    const text = options.text ?? ownText(folder)
    const path = join(dir, folder.variant)
    const baseHash = await folderFingerprint(path)
    const train = lora === undefined
    const base = await loadVelocityNetwork(path, { dtype, train, pack: false, signal })
    try {
      const own =
        lora &&
        ('path' in lora
          ? await Lora.load(base, lora.path, { ...(signal && { signal }) })
          : Lora.create(base, lora))
      return new FineTune(folder, { base, baseHash, lora: own, text })
    } catch (error) {
      base.dispose()
      throw error
    }
  }

  /**
   * The trainer options that the folder decides. `data` is read with the folder's normalisation constants instead of those
   * measured on it, which are others for every data set.
   *
   * @param recipe - how it is trained, to be kept in adapter files
   * @param keeps - clips (by index) from which the network learns to go on as it is without the adapters, whatever they
   *   show: videos of its own for prompts that are not to change
   * @throws ERR_OPTION for `keeps` without adapters: the weights from before are no longer there then
   */
  parts(data: LatentSource, recipe: object = {}, keeps?: (index: number) => boolean): FineTuneParts {
    const { model, text, stages, framesPerUnit, normalisation, lora } = this
    if (keeps && !lora) {
      throw new PyraflowError('ERR_OPTION', {
        what: 'keeps',
        expected: 'a fine-tune with lora',
        received: 'one of all weights',
        remedy: 'Load the folder a second time and give that network to the trainer as `teacher`.',
      })
    }
    const own = { model, text, stages, framesPerUnit, data: withNormalisation(data, normalisation) }
    if (!lora) return own
    const save = { base: this.#baseHash, recipe: { clips: data.length, ...recipe } }
    return {
      ...own,
      parameters: lora.parameters,
      ...(keeps && { teacher: { network: this.#base, clips: keeps } }),
      write: (dir, tensors) => lora.save(join(dir, ADAPTER_FILE), { ...save, tensors }),
    }
  }

  /**
   * Writes what a trainer with these parts has made and returns its path: an adapter file in the folder `out`, or, when
   * all weights were trained, a whole model folder of that name, whose other parts are copied.
   *
   * @throws ERR_IO, also when a model folder of that name is there already; ERR_ABORTED
   */
  async save(
    trainer: Trainer,
    out: string,
    options: { signal?: AbortSignal | undefined } = {},
  ): Promise<string> {
    if (this.lora) {
      await trainer.save(out)
      return join(out, ADAPTER_FILE)
    }
    const { dir, variant } = this.folder
    await writeModelFolder(out, { base: dir, variant, ...options }, (to) => trainer.save(to))
    return out
  }

  /** Frees the network and its adapters. */
  dispose(): void {
    this.lora?.dispose()
    this.#base.dispose()
  }
}

function ownText({ dir, published }: ModelFolder): ImmediateTextEncoder {
  if (!published) return WordEncoder.fromPretrained(join(dir, 'text_encoder'))
  throw new PyraflowError('ERR_OPTION', {
    what: `fine-tuning ${dir}: text`,
    expected: 'features of the captions that were made before',
    received: 'none; its own text encoders are too slow to run in every step',
    remedy:
      'Cache the features (`encodeTexts`, `pyraflow encode --text-encoder`) and give a CachedTextEncoder as `text`.',
  })
}

/** The same latents with other normalisation constants. */
export function withNormalisation(source: LatentSource, normalisation: LatentNormalisation): LatentSource {
  // Sources may be class instances, whose members spreading would lose.
  const { length, captions, buckets } = source
  return { length, captions, normalisation, buckets, gather: (indices) => source.gather(indices) }
}
