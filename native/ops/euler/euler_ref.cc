#include "backends/ref/ref.h"
#include "ops/euler/euler.h"

int32_t pf_ref_euler(const PfArgs* a) {
  PF_TRY(CheckEuler(a));
  const EulerParams& p = PfParams<EulerParams>(a);
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i) {
    double v = Get(a->in[1], i);
    if (PfPresent(a->in[2])) v = Get(a->in[2], i) + p.guidance * (v - Get(a->in[2], i));
    Set(a->out[0], i, Get(a->in[0], i) + p.delta_sigma * v);
  }
  return PF_OK;
}
