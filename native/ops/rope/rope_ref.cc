#include "backends/ref/ref.h"
#include "ops/rope/rope.h"

int32_t pf_ref_rope(const PfArgs* a) {
  RopeShape s;
  if (int32_t e = RopeCheck(a, &s)) return e;
  const PfView &x = a->in[0], &w = a->in[1], &cos = a->in[2], &sin = a->in[3];
  for (int64_t r = 0; r < s.rows * s.heads; ++r) {
    const int64_t n = r / s.heads;
    double square = 0;
    for (int64_t i = 0; i < s.d; ++i) square += Get(x, r * s.d + i) * Get(x, r * s.d + i);
    const double rstd = 1 / sqrt(square / s.d + PfParams<RopeParams>(a).eps);
    const auto t = [&](int64_t i) {
      return PfPresent(w) ? Get(x, r * s.d + i) * rstd * Get(w, i) : Get(x, r * s.d + i);
    };
    if (PfPresent(a->out[1])) Set(a->out[1], r, rstd);
    if (!PfPresent(cos)) {
      for (int64_t i = 0; i < s.d; ++i) Set(a->out[0], r * s.d + i, t(i));
      continue;
    }
    for (int64_t i = 0; i < s.d / 2; ++i) {
      const double c = Get(cos, n * (s.d / 2) + i), si = Get(sin, n * (s.d / 2) + i);
      const double even = t(2 * i), odd = t(2 * i + 1);
      Set(a->out[0], r * s.d + 2 * i, even * c - odd * si);
      Set(a->out[0], r * s.d + 2 * i + 1, even * si + odd * c);
    }
  }
  return PF_OK;
}

int32_t pf_ref_rope_backward(const PfArgs* a) {
  RopeShape s;
  if (int32_t e = RopeBackwardCheck(a, &s)) return e;
  const PfView &x = a->in[0], &w = a->in[1], &cos = a->in[2], &sin = a->in[3], &dy = a->in[5],
               &dw = a->out[1];
  if (PfPresent(dw) && !PfParams<RopeBackwardParams>(a).accumulate)
    for (int64_t i = 0; i < s.d; ++i) Set(dw, i, 0);
  for (int64_t r = 0; r < s.rows * s.heads; ++r) {
    const int64_t n = r / s.heads;
    // Gradient before the rotation: the transpose turns the other way.
    const auto dt = [&](int64_t i) {
      if (!PfPresent(cos)) return Get(dy, r * s.d + i);
      const double c = Get(cos, n * (s.d / 2) + i / 2), si = Get(sin, n * (s.d / 2) + i / 2);
      return Get(dy, r * s.d + i) * c + Get(dy, r * s.d + (i ^ 1)) * (i % 2 ? -si : si);
    };
    if (!PfPresent(w)) {
      for (int64_t i = 0; i < s.d; ++i) Set(a->out[0], r * s.d + i, dt(i));
      continue;
    }
    const double rstd = Get(a->in[4], r);
    double dot = 0;
    for (int64_t i = 0; i < s.d; ++i) {
      const double normal = Get(x, r * s.d + i) * rstd;
      dot += dt(i) * Get(w, i) * normal;
      if (PfPresent(dw)) Set(dw, i, Get(dw, i) + dt(i) * normal);
    }
    for (int64_t i = 0; i < s.d; ++i)
      Set(a->out[0], r * s.d + i, rstd * (dt(i) * Get(w, i) - Get(x, r * s.d + i) * rstd * dot / s.d));
  }
  return PF_OK;
}
