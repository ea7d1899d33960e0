// cast [x] -> [y]: the same values in another dtype, any pair of dtypes. To bf16 and f16 round to nearest
// even; to integers truncate, saturate, NaN becomes 0.
#pragma once
#include "ops/pointwise/shape_text.h"

static inline int32_t CheckCast(const PfArgs* a) {
  if (PfCount(a->in[0]) != PfCount(a->out[0])) return NeedSameDims(a, "cast", "y", a->in[0], a->out[0]);
  return PF_OK;
}
