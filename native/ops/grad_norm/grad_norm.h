// grad_norm [g f32 [n]] -> [f32 [2]]: {norm, coefficient} with norm = |g|_2 and coefficient =
// min(1, max_norm / (norm + 1e-6)); 1 when max_norm <= 0; NaN when the norm is not finite, which adamw takes
// as a skip.
#pragma once
#include <math.h>

#include "core/half.h"  // PF_HD
#include "ops/pointwise/shape_text.h"

struct GradNormParams {
  double max_norm;
};

PF_HD static inline double ClipCoefficient(double norm, double max_norm) {
  if (!(norm - norm == 0)) return NAN;
  if (max_norm <= 0) return 1;
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient < 1 ? coefficient : 1;
}

static inline int32_t CheckGradNorm(const PfArgs* a) {
  if (PfCount(a->out[0]) == 2) return PF_OK;
  return Fail(a, PF_ERR_SHAPE, "grad_norm: expected an output [2], received %s", ShapeText(a->out[0]).text);
}

// The types that kernels take; the reference also takes f64.
static inline int32_t NeedGradNormTypes(const PfArgs* a) {
  PF_TRY(NeedFloat(a, "grad_norm", "g", a->in[0]));
  if (a->out[0].dtype == PF_F32) return PF_OK;
  return Fail(a, PF_ERR_DTYPE, "grad_norm: expected an f32 output, received dtype %d", a->out[0].dtype);
}
