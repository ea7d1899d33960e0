// mix [a?, b?, sigma f32 [B]] -> [y [B, ..]]: y[b] = sigma_b a[b] + (1 - sigma_b) b[b]; an absent operand
// counts as 0.
#pragma once
#include "ops/pointwise/shape_text.h"

static inline int32_t CheckMix(const PfArgs* a) {
  const PfView &sigma = a->in[2], &y = a->out[0];
  for (int i = 0; i < 2; ++i)
    if (PfPresent(a->in[i])) PF_TRY(NeedSameDims(a, "mix", i ? "b" : "a", y, a->in[i]));
  if (y.rank < 1 || PfCount(sigma) != y.dims[0])
    return Fail(a, PF_ERR_SHAPE, "mix: expected sigma [B] with B of y %s, received %s", ShapeText(y).text,
                ShapeText(sigma).text);
  return PF_OK;
}

// The types that kernels take; the reference also takes f64.
static inline int32_t NeedMixTypes(const PfArgs* a) {
  PF_TRY(NeedFloat(a, "mix", "a", a->in[0]));
  PF_TRY(NeedFloat(a, "mix", "b", a->in[1]));
  PF_TRY(NeedFloat(a, "mix", "y", a->out[0]));
  if (a->in[2].dtype == PF_F32) return PF_OK;
  return Fail(a, PF_ERR_DTYPE, "mix: expected sigma f32, received dtype %d", a->in[2].dtype);
}
