import { engine } from '../engine/engine.ts'
import { scope } from '../tensor/scope.ts'
import { Tensor } from '../tensor/tensor.ts'

// What is left of the random weights beside the identity: enough to tell channels apart.
const RANDOM_SHARE = 0.3

/**
 * Lets a new VAE begin as a plain resampler: branches of residual blocks add nothing, down- and upsampling convolutions
 * pass their channels on. Deep narrow stacks of random convolutions otherwise spend hundreds of steps before colours
 * find their way through.
 */
export function startAsResampler(parameters: ReadonlyMap<string, Tensor>): void {
  scope(() => {
    for (const [name, weight] of parameters) {
      if (/resnets\.\d+\.conv2\.conv\.weight$|to_out\.0\.weight$/.test(name)) {
        engine.run('fill', [], [weight], [0])
        continue
      }
      const factor = /temporal_upsamplers/.test(name) ? 2 : /upsamplers/.test(name) ? 4 : 1
      const passes = /(samplers\.0\.conv\.conv|conv_shortcut\.conv)\.weight$/.test(name)
      if (!passes) continue
      const identity = Tensor.from(
        passOn(weight.shape, factor, /\.downsamplers/.test(name)),
        weight.shape,
        weight.dtype,
      )
      engine.run('axpby', [weight, identity], [weight], [RANDOM_SHARE, 1, 0])
    }
  })
}

/** Weights [O, C, kt, kh, kw] that copy channel c to outputs c·factor … of the newest frame; averaged over space or not. */
function passOn(shape: readonly number[], factor: number, average: boolean): Float32Array {
  const [outs, channels, kt, kh, kw] = shape as [number, number, number, number, number]
  const values = new Float32Array(outs * channels * kt * kh * kw)
  for (let o = 0; o < outs; o++) {
    const c = Math.floor(o / factor) % channels
    for (let y = 0; y < kh; y++) {
      for (let x = 0; x < kw; x++) {
        const centre = y === kh >> 1 && x === kw >> 1
        const at = (((o * channels + c) * kt + kt - 1) * kh + y) * kw + x
        values[at] = average ? 1 / (kh * kw) : centre ? 1 : 0
      }
    }
  }
  return values
}
