#include "backends/ref/ref.h"
#include "ops/grad_norm/grad_norm.h"

int32_t pf_ref_grad_norm(const PfArgs* a) {
  PF_TRY(CheckGradNorm(a));
  double sum = 0;
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i) sum += Get(a->in[0], i) * Get(a->in[0], i);
  Set(a->out[0], 0, sqrt(sum));
  Set(a->out[0], 1, ClipCoefficient(sqrt(sum), PfParams<GradNormParams>(a).max_norm));
  return PF_OK;
}
