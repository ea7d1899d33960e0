#include "backends/ref/ref.h"
#include "ops/mix/mix.h"

int32_t pf_ref_mix(const PfArgs* a) {
  PF_TRY(CheckMix(a));
  const PfView& y = a->out[0];
  const int64_t n = PfProduct(y, 1, y.rank);
  for (int64_t i = 0; i < PfCount(y); ++i) {
    const double sigma = Get(a->in[2], i / n);
    Set(y, i,
        (PfPresent(a->in[0]) ? sigma * Get(a->in[0], i) : 0) +
            (PfPresent(a->in[1]) ? (1 - sigma) * Get(a->in[1], i) : 0));
  }
  return PF_OK;
}
