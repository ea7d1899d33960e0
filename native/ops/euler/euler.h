// euler [x, v_cond, v_uncond?] -> [y]: y = x + delta_sigma v, one step of the flow, with classifier-free
// guidance v = v_uncond + guidance (v_cond - v_uncond) when v_uncond is given. y may be the memory of x.
#pragma once
#include "ops/pointwise/shape_text.h"

struct EulerParams {
  double delta_sigma, guidance;
};

static inline int32_t CheckEuler(const PfArgs* a) {
  PF_TRY(NeedSameDims(a, "euler", "v_cond", a->in[0], a->in[1]));
  if (PfPresent(a->in[2])) PF_TRY(NeedSameDims(a, "euler", "v_uncond", a->in[0], a->in[2]));
  return NeedSameDims(a, "euler", "y", a->in[0], a->out[0]);
}

// The types that kernels take; the reference also takes f64.
static inline int32_t NeedEulerTypes(const PfArgs* a) {
  PF_TRY(NeedFloat(a, "euler", "x", a->in[0]));
  PF_TRY(NeedFloat(a, "euler", "v_cond", a->in[1]));
  PF_TRY(NeedFloat(a, "euler", "v_uncond", a->in[2]));
  return NeedFloat(a, "euler", "y", a->out[0]);
}
