#include "backends/ref/ref.h"
#include "ops/mse/mse.h"

int32_t pf_ref_mse(const PfArgs* a) {
  PF_TRY(CheckMse(a, "mse", a->out[0]));
  const int64_t n = PfProduct(a->in[0], 1, a->in[0].rank);
  for (int64_t b = 0; b < a->in[0].dims[0]; ++b) {
    double sum = 0;
    for (int64_t i = b * n; i < (b + 1) * n; ++i) {
      const double d = Get(a->in[0], i) - Get(a->in[1], i);
      sum += d * d;
    }
    Set(a->out[0], b, sum / n);
  }
  return PF_OK;
}

int32_t pf_ref_mse_backward(const PfArgs* a) {
  PF_TRY(CheckMse(a, "mse_backward", a->in[2]));
  const int64_t n = PfProduct(a->in[0], 1, a->in[0].rank);
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i)
    Set(a->out[0], i, 2.0 / n * Get(a->in[2], i / n) * (Get(a->in[0], i) - Get(a->in[1], i)));
  return PF_OK;
}
