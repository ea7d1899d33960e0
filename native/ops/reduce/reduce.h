// sum [x as [outer, count, inner]] -> [+y [outer, inner]]: y (= or +=) scale * sum over count.
#pragma once
#include "ops/pointwise/shape_text.h"

struct SumParams {
  double outer, count, inner, scale, accumulate;
};

static inline int32_t CheckSum(const PfArgs* a) {
  const SumParams& p = PfParams<SumParams>(a);
  if (p.outer * p.count * p.inner == static_cast<double>(PfCount(a->in[0])) &&
      p.outer * p.inner == static_cast<double>(PfCount(a->out[0])))
    return PF_OK;
  return Fail(a, PF_ERR_SHAPE, "sum: expected x [%.0f, %.0f, %.0f] and y [%.0f, %.0f], received %s and %s",
              p.outer, p.count, p.inner, p.outer, p.inner, ShapeText(a->in[0]).text,
              ShapeText(a->out[0]).text);
}
