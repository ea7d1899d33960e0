import { PyraflowError } from '../engine/errors.ts'
import { drain, type Steps } from '../tensor/tape.ts'
import { PyramidFluxTransformer } from './dit-flux.ts'
import { PyramidDiffusionMMDiT } from './dit-mmdit.ts'
import { FLUX_CLASS, FLUX_DEFAULTS } from './flux-config.ts'
import { identify } from './identify.ts'
import { MMDIT_CLASS, MMDIT_DEFAULTS } from './mmdit-config.ts'
import type { NetworkConfig, TransformerOptions, VelocityNetwork } from './velocity-network.ts'

/** A network family by the name of its latent normalisation and of `identify`. */
export type NetworkKind = 'flux' | 'mmdit'

/**
 * Which family a folder's network belongs to.
 *
 * @throws ERR_CHECKPOINT when it holds another kind of model, or none.
 */
export function networkKind(dir: string): NetworkKind {
  const kind = identify(dir)
  if (kind === 'flux' || kind === 'mmdit') return kind
  throw new PyraflowError('ERR_CHECKPOINT', {
    what: dir,
    expected: `${FLUX_CLASS} or ${MMDIT_CLASS}`,
    received: kind,
    remedy: 'Give the folder of a velocity network, for example diffusion_transformer_384p.',
  })
}

/** Loads the network of a folder, of whichever family. @throws as `fromPretrained` of both */
export async function loadVelocityNetwork(
  dir: string,
  options: TransformerOptions = {},
): Promise<VelocityNetwork> {
  return networkKind(dir) === 'mmdit'
    ? PyramidDiffusionMMDiT.fromPretrained(dir, options)
    : PyramidFluxTransformer.fromPretrained(dir, options)
}

/**
 * A new network of the class that `_class_name` names, flux when it names none.
 *
 * @throws ERR_OPTION for a configuration that fits no network.
 */
export function createVelocityNetwork(
  config: Readonly<Record<string, unknown>>,
  options: TransformerOptions & { seed: number | bigint },
): VelocityNetwork {
  return drain(velocityNetworkSteps(config, options))
}

/** `createVelocityNetwork` that pauses after every block, for `sliced`. */
export function velocityNetworkSteps(
  config: Readonly<Record<string, unknown>>,
  options: TransformerOptions & { seed: number | bigint },
): Steps<VelocityNetwork> {
  return config._class_name === MMDIT_CLASS
    ? PyramidDiffusionMMDiT.createSteps(config, options)
    : PyramidFluxTransformer.createSteps(config, options)
}

/** The fields that such a configuration may have, with what absent ones stand for. */
export function networkDefaults(config: Readonly<Record<string, unknown>>): Readonly<NetworkConfig> {
  return config._class_name === MMDIT_CLASS ? MMDIT_DEFAULTS : FLUX_DEFAULTS
}
