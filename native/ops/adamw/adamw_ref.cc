#include "backends/ref/ref.h"
#include "ops/adamw/adamw.h"

int32_t pf_ref_adamw(const PfArgs* a) {
  PF_TRY(CheckAdamw(a));
  const AdamwParams& p = PfParams<AdamwParams>(a);
  const PfView &param = a->out[0], &first = a->out[1], &second = a->out[2];
  const double clip = a->n_in > 1 && PfPresent(a->in[1]) ? Get(a->in[1], 1) : 1;
  if (!isfinite(clip)) return PF_OK;
  for (int64_t i = 0; i < PfCount(param); ++i) {
    const double g = clip * Get(a->in[0], i);
    const double m = p.beta1 * Get(first, i) + (1 - p.beta1) * g;
    const double v = p.beta2 * Get(second, i) + (1 - p.beta2) * g * g;
    const double x = Get(param, i) * (1 - p.lr * p.weight_decay) -
                     p.lr * (m / p.bias_correction1) / (sqrt(v / p.bias_correction2) + p.eps);
    Set(first, i, m);
    Set(second, i, v);
    Set(param, i, x);
    if (a->n_out > 3 && PfPresent(a->out[3])) Set(a->out[3], i, x);
  }
  return PF_OK;
}
