#include "backends/ref/ref.h"
#include "ops/group_norm/group_norm.h"

int32_t pf_ref_group_norm(const PfArgs* a) {
  GroupNormShape s;
  if (int32_t e = GroupNormForwardCheck(a, &s)) return e;
  const auto& params = PfParams<GroupNormParams>(a);
  const PfView &x = a->in[0], &w = a->in[1], &b = a->in[2];
  const int64_t width = s.channels / s.groups;
  const double count = static_cast<double>(s.pixels * width);
  for (int64_t f = 0; f < s.frames; ++f)
    for (int64_t g = 0; g < s.groups; ++g) {
      const auto at = [&](int64_t p, int64_t c) { return (f * s.pixels + p) * s.channels + g * width + c; };
      double mean = 0, var = 0;
      for (int64_t p = 0; p < s.pixels; ++p)
        for (int64_t c = 0; c < width; ++c) mean += Get(x, at(p, c));
      mean /= count;
      for (int64_t p = 0; p < s.pixels; ++p)
        for (int64_t c = 0; c < width; ++c) var += (Get(x, at(p, c)) - mean) * (Get(x, at(p, c)) - mean);
      const double rstd = 1 / sqrt(var / count + params.eps);
      for (int64_t p = 0; p < s.pixels; ++p)
        for (int64_t c = 0; c < width; ++c) {
          const double z = (Get(x, at(p, c)) - mean) * rstd * Get(w, g * width + c) + Get(b, g * width + c);
          Set(a->out[0], at(p, c), params.silu ? z / (1 + exp(-z)) : z);
        }
      if (PfPresent(a->out[1])) Set(a->out[1], f * s.groups + g, mean);
      if (PfPresent(a->out[2])) Set(a->out[2], f * s.groups + g, rstd);
    }
  return PF_OK;
}

int32_t pf_ref_group_norm_backward(const PfArgs* a) {
  GroupNormShape s;
  if (int32_t e = GroupNormBackwardCheck(a, &s)) return e;
  const auto& params = PfParams<GroupNormBackwardParams>(a);
  const PfView &x = a->in[0], &w = a->in[1], &b = a->in[2], &dy = a->in[5];
  const int64_t width = s.channels / s.groups;
  const double count = static_cast<double>(s.pixels * width);
  const auto normal = [&](int64_t f, int64_t p, int64_t c) {
    const int64_t g = f * s.groups + c / width;
    return (Get(x, (f * s.pixels + p) * s.channels + c) - Get(a->in[3], g)) * Get(a->in[4], g);
  };
  const auto dz = [&](int64_t f, int64_t p, int64_t c) {
    const double z = normal(f, p, c) * Get(w, c) + Get(b, c), sigmoid = 1 / (1 + exp(-z));
    const double slope = params.silu ? sigmoid * (1 + z * (1 - sigmoid)) : 1;
    return Get(dy, (f * s.pixels + p) * s.channels + c) * slope;
  };
  for (int64_t c = 0; c < s.channels; ++c) {
    double dw = 0, db = 0;
    for (int64_t f = 0; f < s.frames; ++f)
      for (int64_t p = 0; p < s.pixels; ++p) {
        dw += dz(f, p, c) * normal(f, p, c);
        db += dz(f, p, c);
      }
    if (PfPresent(a->out[1])) Set(a->out[1], c, dw + (params.accumulate ? Get(a->out[1], c) : 0));
    if (PfPresent(a->out[2])) Set(a->out[2], c, db + (params.accumulate ? Get(a->out[2], c) : 0));
  }
  for (int64_t f = 0; f < s.frames; ++f)
    for (int64_t g = 0; g < s.groups; ++g) {
      double sum = 0, dot = 0;
      for (int64_t p = 0; p < s.pixels; ++p)
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          sum += dz(f, p, c) * Get(w, c);
          dot += dz(f, p, c) * Get(w, c) * normal(f, p, c);
        }
      for (int64_t p = 0; p < s.pixels; ++p)
        for (int64_t c = g * width; c < (g + 1) * width; ++c)
          Set(a->out[0], (f * s.pixels + p) * s.channels + c,
              Get(a->in[4], f * s.groups + g) *
                  (dz(f, p, c) * Get(w, c) - sum / count - normal(f, p, c) * dot / count));
    }
  return PF_OK;
}
