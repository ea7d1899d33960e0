import { type AttentionOptions, jointAttention, selfAttention, type TokenArrays } from '../nn/attention.ts'
import { linearLayer } from '../nn/linear.ts'
import { feedForward } from '../nn/mlp.ts'
import { modulate, modulatedNorm, modulation } from '../nn/norm.ts'
import type { Weights } from '../nn/weights.ts'
import { concat, copyInto } from '../ops/copy.ts'
import { gatedAdd } from '../ops/pointwise.ts'
import { needsGrad } from '../tensor/tape.ts'
import { Tensor } from '../tensor/tensor.ts'

/**
 * The streams, latent tokens X [N, d] and text tokens C [T, d], after a block; e = SiLU(temb) [R, d]. Without C, or where
 * the text stream ends, X alone.
 */
export type DoubleBlock = (streams: readonly Tensor[], e: Tensor, arrays: TokenArrays) => Tensor[]

/** All tokens Z [T + N, d], text first. */
export type SingleBlock = (z: Tensor, e: Tensor, arrays: TokenArrays) => Tensor

/**
 * The two-stream block (spec/dit-flux.md eq. 10). With `textOutput: false` (the last mmdit block) text only
 * contributes keys, values and queries. Where keys and values of text are kept ones, C is absent.
 */
export function doubleBlock(w: Weights, options: AttentionOptions): DoubleBlock {
  const width = options.heads * options.headDim
  const norm1 = modulation(w.sub('norm1'), width, 6)
  const norm1Context = options.textOutput ? modulation(w.sub('norm1_context'), width, 6) : null
  const lastNormContext = options.textOutput ? null : modulatedNorm(w.sub('norm1_context'), width)
  const tokens = w.forTokens()
  const attend = jointAttention(tokens.sub('attn'), options)
  const ff = feedForward(tokens.sub('ff'), width)
  const ffContext = options.textOutput ? feedForward(tokens.sub('ff_context'), width) : null

  return ([x, c], e, arrays) => {
    if (!x) throw new Error('the latent stream is missing')
    const { latentRows, textRows, local } = arrays
    const [s1, c1, g1, s2, c2, g2] = norm1(e) as [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    const latent = modulate(x, s1, c1, latentRows)
    if (!c || !norm1Context || !ffContext || lastNormContext) {
      const text = c && lastNormContext ? lastNormContext(c, e, textRows) : null
      const y = gatedAdd(x, attend(latent, text, arrays)[0], g1, latentRows)
      return [
        gatedAdd(
          y,
          local(() => ff(modulate(y, s2, c2, latentRows))),
          g2,
          latentRows,
        ),
      ]
    }
    const [ts1, tc1, tg1, ts2, tc2, tg2] = norm1Context(e) as [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    const [ox, oc] = attend(latent, modulate(c, ts1, tc1, textRows), arrays) as [Tensor, Tensor]
    const y = gatedAdd(x, ox, g1, latentRows)
    const d = gatedAdd(c, oc, tg1, textRows)
    return [
      gatedAdd(
        y,
        local(() => ff(modulate(y, s2, c2, latentRows))),
        g2,
        latentRows,
      ),
      gatedAdd(
        d,
        local(() => ffContext(modulate(d, ts2, tc2, textRows))),
        tg2,
        textRows,
      ),
    ]
  }
}

/** The parallel block (spec/dit-flux.md eq. 12): Z + g ⊙ proj_out([attention, GELU(proj_mlp)]). */
export function singleBlock(
  w: Weights,
  options: Pick<AttentionOptions, 'heads' | 'headDim' | 'eps'>,
): SingleBlock {
  const width = options.heads * options.headDim
  const norm = modulation(w.sub('norm'), width, 3)
  const tokens = w.forTokens()
  const projMlp = linearLayer(tokens.sub('proj_mlp'), width, 4 * width)
  const projOut = linearLayer(tokens.sub('proj_out'), 5 * width, width)
  const attend = selfAttention(tokens.sub('attn'), options)
  // Attention and hidden layer in one tensor [T + N, 5d], for which nothing is copied but the attention's part.
  const beside = (y: Tensor, arrays: TokenArrays): Tensor => {
    if (arrays.recording || needsGrad(y)) {
      return concat([attend(y, arrays), projMlp(y, { activation: 'geluTanh' })], 1)
    }
    const both = Tensor.empty([y.shape[0] as number, 5 * width], y.dtype)
    arrays.local(() => copyInto(attend(y, arrays), both, 1, 0))
    return projMlp(y, { activation: 'geluTanh', into: both, column: width })
  }

  return (z, e, arrays) => {
    const [shift, scale, gate] = norm(e) as [Tensor, Tensor, Tensor]
    const y = modulate(z, shift, scale, arrays.jointRows)
    return gatedAdd(z, projOut(beside(y, arrays)), gate, arrays.jointRows)
  }
}
