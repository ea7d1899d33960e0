#include "backends/ref/ref.h"
#include "ops/reduce/reduce.h"

int32_t pf_ref_sum(const PfArgs* a) {
  PF_TRY(CheckSum(a));
  const SumParams& p = PfParams<SumParams>(a);
  const int64_t outer = p.outer, count = p.count, inner = p.inner;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      double sum = 0;
      for (int64_t c = 0; c < count; ++c) sum += Get(a->in[0], (o * count + c) * inner + i);
      const double before = p.accumulate != 0 ? Get(a->out[0], o * inner + i) : 0;
      Set(a->out[0], o * inner + i, before + p.scale * sum);
    }
  }
  return PF_OK;
}
