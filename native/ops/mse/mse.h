// mse [pred [B, ..], target [B, ..]] -> [loss f32 [B]]: mean of (pred - target)^2 over everything but B.
// mse_backward [pred, target, dloss f32 [B]] -> [dpred]: 2 / n dloss_b (pred - target).
#pragma once
#include "ops/pointwise/shape_text.h"

static inline int32_t CheckMse(const PfArgs* a, const char* op, const PfView& per_batch) {
  const PfView& pred = a->in[0];
  PF_TRY(NeedSameDims(a, op, "target", pred, a->in[1]));
  if (pred.rank < 1 || PfCount(per_batch) != pred.dims[0])
    return Fail(a, PF_ERR_SHAPE, "%s: expected one loss for each of pred %s, received %s", op,
                ShapeText(pred).text, ShapeText(per_batch).text);
  return PF_OK;
}

// The types that kernels take; the reference also takes f64.
static inline int32_t NeedMseTypes(const PfArgs* a, const char* op, const char* name,
                                   const PfView& per_batch) {
  PF_TRY(NeedFloat(a, op, "pred", a->in[0]));
  PF_TRY(NeedFloat(a, op, "target", a->in[1]));
  if (per_batch.dtype == PF_F32) return PF_OK;
  return Fail(a, PF_ERR_DTYPE, "%s: expected %s f32, received dtype %d", op, name, per_batch.dtype);
}
