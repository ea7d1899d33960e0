#include "backends/ref/ref.h"
#include "ops/norm/norm.h"

int32_t pf_ref_norm_modulate(const PfArgs* a) {
  NormShape s;
  if (int32_t e = NormModulateCheck(a, &s)) return e;
  if (int32_t e = NormCheckRows(a, "norm_modulate", a->in[3], s)) return e;
  const PfView &x = a->in[0], &shift = a->in[1], &scale = a->in[2], &rows = a->in[3];
  const double eps = PfParams<NormParams>(a).eps;
  for (int64_t n = 0; n < s.rows; ++n) {
    double mean = 0, var = 0;
    for (int64_t i = 0; i < s.d; ++i) mean += Get(x, n * s.d + i) / s.d;
    for (int64_t i = 0; i < s.d; ++i) {
      const double c = Get(x, n * s.d + i) - mean;
      var += c * c / s.d;
    }
    const double rstd = 1 / sqrt(var + eps);
    const int64_t r = PfPresent(rows) ? static_cast<int64_t>(Get(rows, n)) : 0;
    for (int64_t i = 0; i < s.d; ++i) {
      double y = (Get(x, n * s.d + i) - mean) * rstd;
      if (PfPresent(scale)) y *= 1 + Get(scale, r * s.d + i);
      if (PfPresent(shift)) y += Get(shift, r * s.d + i);
      Set(a->out[0], n * s.d + i, y);
    }
    if (PfPresent(a->out[1])) Set(a->out[1], n, mean);
    if (PfPresent(a->out[2])) Set(a->out[2], n, rstd);
  }
  return PF_OK;
}

int32_t pf_ref_norm_modulate_backward(const PfArgs* a) {
  NormShape s;
  if (int32_t e = NormModulateBackwardCheck(a, &s)) return e;
  if (int32_t e = NormCheckRows(a, "norm_modulate_backward", a->in[4], s)) return e;
  const PfView &x = a->in[0], &scale = a->in[3], &rows = a->in[4], &dy = a->in[5];
  // One column at a time in double, so that a narrow output is rounded once.
  for (int64_t r = 0; r < s.entries; ++r)
    for (int64_t i = 0; i < s.d; ++i) {
      double dshift = 0, dscale = 0;
      for (int64_t n = 0; n < s.rows; ++n) {
        if (PfPresent(rows) && static_cast<int64_t>(Get(rows, n)) != r) continue;
        const double g = Get(dy, n * s.d + i);
        dshift += g;
        dscale += g * (Get(x, n * s.d + i) - Get(a->in[1], n)) * Get(a->in[2], n);
      }
      if (PfPresent(a->out[1])) Set(a->out[1], r * s.d + i, dshift);
      if (PfPresent(a->out[2])) Set(a->out[2], r * s.d + i, dscale);
    }
  for (int64_t n = 0; n < s.rows; ++n) {
    const double mean = Get(a->in[1], n), rstd = Get(a->in[2], n);
    const int64_t r = PfPresent(rows) ? static_cast<int64_t>(Get(rows, n)) : 0;
    double sum_g = 0, sum_gx = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int64_t i = 0; i < s.d; ++i) {
        const double g = Get(dy, n * s.d + i) * (PfPresent(scale) ? 1 + Get(scale, r * s.d + i) : 1);
        const double xn = (Get(x, n * s.d + i) - mean) * rstd;
        if (pass == 0) {
          sum_g += g;
          sum_gx += g * xn;
        } else {
          Set(a->out[0], n * s.d + i, rstd * (g - sum_g / s.d - xn * sum_gx / s.d));
        }
      }
  }
  return PF_OK;
}

int32_t pf_ref_rms_norm(const PfArgs* a) {
  NormShape s;
  if (int32_t e = RmsNormCheck(a, &s)) return e;
  for (int64_t n = 0; n < s.rows; ++n) {
    double square = 0;
    for (int64_t i = 0; i < s.d; ++i) square += Get(a->in[0], n * s.d + i) * Get(a->in[0], n * s.d + i);
    const double rstd = 1 / sqrt(square / s.d + PfParams<NormParams>(a).eps);
    for (int64_t i = 0; i < s.d; ++i)
      Set(a->out[0], n * s.d + i, Get(a->in[0], n * s.d + i) * rstd * Get(a->in[1], i));
    if (PfPresent(a->out[1])) Set(a->out[1], n, rstd);
  }
  return PF_OK;
}

int32_t pf_ref_rms_norm_backward(const PfArgs* a) {
  NormShape s;
  if (int32_t e = RmsNormBackwardCheck(a, &s)) return e;
  const PfView &x = a->in[0], &w = a->in[1], &rstds = a->in[2], &dy = a->in[3], &dw = a->out[1];
  for (int64_t i = 0; PfPresent(dw) && i < s.d; ++i) {
    double sum = PfParams<RmsNormBackwardParams>(a).accumulate ? Get(dw, i) : 0;
    for (int64_t n = 0; n < s.rows; ++n) sum += Get(dy, n * s.d + i) * Get(x, n * s.d + i) * Get(rstds, n);
    Set(dw, i, sum);
  }
  for (int64_t n = 0; n < s.rows; ++n) {
    const double rstd = Get(rstds, n);
    double dot = 0;
    for (int64_t i = 0; i < s.d; ++i) dot += Get(dy, n * s.d + i) * Get(w, i) * Get(x, n * s.d + i) * rstd;
    for (int64_t i = 0; i < s.d; ++i) {
      const double g = Get(dy, n * s.d + i) * Get(w, i), xn = Get(x, n * s.d + i) * rstd;
      Set(a->out[0], n * s.d + i, rstd * (g - xn * dot / s.d));
    }
  }
  return PF_OK;
}
