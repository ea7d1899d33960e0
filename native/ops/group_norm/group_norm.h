// Group normalisation over frames, channels last, with the SiLU that follows it in every block.
//
// group_norm [x[F,P,C], w[C], b[C]] -> [y[F,P,C], mean? f32[F,G], rstd? f32[F,G]]
//   z = (x - mean[f,g]) * rstd[f,g] * w[c] + b[c],  y = silu ? z * sigmoid(z) : z
//   statistics over the P pixels and C/G channels of one frame; var biased, rstd = 1 / sqrt(var + eps)
// group_norm_backward [x, w, b, mean, rstd, dy] -> [dx, +dw? f32[C], +db? f32[C]]   z is recomputed
#pragma once
#include "core/check.h"

struct GroupNormParams {
  double groups, eps, silu;
};
struct GroupNormBackwardParams {
  double groups, silu, accumulate;
};

struct GroupNormShape {
  int64_t frames = 0, pixels = 0, channels = 0, groups = 0;
};

static inline int32_t GroupNormCheck(const PfArgs* a, const char* op, double groups, GroupNormShape* s) {
  const PfView& x = a->in[0];
  if (x.rank != 3) return Fail(a, PF_ERR_SHAPE, "%s: expected x [F, P, C], received rank %d", op, x.rank);
  *s = {x.dims[0], x.dims[1], x.dims[2], static_cast<int64_t>(groups)};
  if (s->groups < 1 || s->channels % s->groups)
    return Fail(a, PF_ERR_OPTION, "%s: expected groups dividing C = %lld, received %lld", op,
                static_cast<long long>(s->channels), static_cast<long long>(s->groups));
  for (int i = 1; i < 3; ++i)
    if (PfCount(a->in[i]) != s->channels)
      return Fail(a, PF_ERR_SHAPE, "%s: expected w and b [C] with C = %lld, received %lld", op,
                  static_cast<long long>(s->channels), static_cast<long long>(PfCount(a->in[i])));
  if (!PfSameDims(x, a->out[0]))
    return Fail(a, PF_ERR_SHAPE, "%s: expected the output to have the shape of x", op);
  return PF_OK;
}

static inline int32_t GroupNormForwardCheck(const PfArgs* a, GroupNormShape* s) {
  const char* op = "group_norm";
  if (int32_t e = GroupNormCheck(a, op, PfParams<GroupNormParams>(a).groups, s)) return e;
  for (int i = 1; i < 3; ++i)
    if (PfPresent(a->out[i]) && PfCount(a->out[i]) != s->frames * s->groups)
      return Fail(a, PF_ERR_SHAPE, "%s: expected mean and rstd [F, G]", op);
  return PF_OK;
}

static inline int32_t GroupNormBackwardCheck(const PfArgs* a, GroupNormShape* s) {
  const char* op = "group_norm_backward";
  if (int32_t e = GroupNormCheck(a, op, PfParams<GroupNormBackwardParams>(a).groups, s)) return e;
  if (!PfSameDims(a->in[0], a->in[5]))
    return Fail(a, PF_ERR_SHAPE, "%s: expected dy with the shape of x", op);
  for (int i = 3; i < 5; ++i)
    if (PfCount(a->in[i]) != s->frames * s->groups)
      return Fail(a, PF_ERR_SHAPE, "%s: expected mean and rstd [F, G]", op);
  for (int i = 1; i < 3; ++i)
    if (PfPresent(a->out[i]) && PfCount(a->out[i]) != s->channels)
      return Fail(a, PF_ERR_SHAPE, "%s: expected dw and db [C]", op);
  return PF_OK;
}

static inline int32_t GroupNormDtypes(const PfArgs* a) {
  return NeedFloats(a, "group_norm", 0, 1u << 1 | 1u << 2);
}
static inline int32_t GroupNormBackwardDtypes(const PfArgs* a) {
  return NeedFloats(a, "group_norm_backward", 1u << 3 | 1u << 4, 1u << 1 | 1u << 2);
}
