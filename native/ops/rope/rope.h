// Rotary position embedding over adjacent pairs, with the RMS norm of queries and keys that precedes it.
//
// rope [x[N,H,D], w?[D], cos? f32[N,D/2], sin? f32[N,D/2]] -> [y[N,H,D], rstd? f32[N,H]]
//   t = w ? x * rstd * w : x,  rstd = 1 / sqrt(mean(x^2) + eps)
//   y[2i] = t[2i] cos - t[2i+1] sin,  y[2i+1] = t[2i] sin + t[2i+1] cos   (cos and sin of row n; absent: y =
//   t)
// rope_backward [x, w?, cos?, sin?, rstd?, dy] -> [dx, +dw? f32[D]]
// Leading axes are folded: x [..., H, D] has N = their product.
#pragma once
#include "core/check.h"

struct RopeParams {
  double eps;
};
struct RopeBackwardParams {
  double accumulate;
};

struct RopeShape {
  int64_t rows = 0, heads = 0, d = 0;
};

static inline int32_t RopeCommonCheck(const PfArgs* a, const char* op, RopeShape* s) {
  const PfView &x = a->in[0], &w = a->in[1], &cos = a->in[2], &sin = a->in[3];
  if (x.rank < 3) return Fail(a, PF_ERR_SHAPE, "%s: expected x [N, H, D], received rank %d", op, x.rank);
  *s = {PfProduct(x, 0, x.rank - 2), x.dims[x.rank - 2], x.dims[x.rank - 1]};
  if (PfPresent(w) && PfCount(w) != s->d)
    return Fail(a, PF_ERR_SHAPE, "%s: expected w [D] with D = %lld, received %lld", op,
                static_cast<long long>(s->d), static_cast<long long>(PfCount(w)));
  if (PfPresent(cos) != PfPresent(sin))
    return Fail(a, PF_ERR_SHAPE, "%s: expected both cos and sin or none", op);
  if (PfPresent(cos) && (s->d % 2 || PfCount(cos) != s->rows * (s->d / 2) || PfCount(sin) != PfCount(cos)))
    return Fail(
        a, PF_ERR_SHAPE, "%s: expected cos and sin [N, D/2] with N = %lld and D = %lld, received %lld", op,
        static_cast<long long>(s->rows), static_cast<long long>(s->d), static_cast<long long>(PfCount(cos)));
  if (PfCount(a->out[0]) != PfCount(x))
    return Fail(a, PF_ERR_SHAPE, "%s: expected the output to have the shape of x", op);
  return PF_OK;
}

static inline int32_t RopeCheck(const PfArgs* a, RopeShape* s) {
  if (int32_t e = RopeCommonCheck(a, "rope", s)) return e;
  if (PfPresent(a->out[1]) && PfCount(a->out[1]) != s->rows * s->heads)
    return Fail(a, PF_ERR_SHAPE, "rope: expected rstd [N, H]");
  if (PfPresent(a->out[1]) && !PfPresent(a->in[1]))
    return Fail(a, PF_ERR_SHAPE, "rope: rstd exists only with a norm weight w");
  return PF_OK;
}

static inline int32_t RopeBackwardCheck(const PfArgs* a, RopeShape* s) {
  const char* op = "rope_backward";
  if (int32_t e = RopeCommonCheck(a, op, s)) return e;
  if (PfCount(a->in[5]) != PfCount(a->in[0]) || !PfPresent(a->in[5]))
    return Fail(a, PF_ERR_SHAPE, "%s: expected dy with the shape of x", op);
  if (PfPresent(a->in[1]) && (!PfPresent(a->in[4]) || PfCount(a->in[4]) != s->rows * s->heads))
    return Fail(a, PF_ERR_SHAPE, "%s: expected rstd [N, H] with a norm weight w", op);
  if (PfPresent(a->out[1]) && (!PfPresent(a->in[1]) || PfCount(a->out[1]) != s->d))
    return Fail(a, PF_ERR_SHAPE, "%s: expected dw [D] and a norm weight w", op);
  return PF_OK;
}

static inline int32_t RopeDtypes(const PfArgs* a) {
  return NeedFloats(a, "rope", 1u << 2 | 1u << 3, 1u << 1);
}
static inline int32_t RopeBackwardDtypes(const PfArgs* a) {
  return NeedFloats(a, "rope_backward", 1u << 2 | 1u << 3 | 1u << 4, 1u << 1);
}
