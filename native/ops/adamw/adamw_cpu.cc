#include "ops/adamw/adamw.h"
#include "ops/pointwise/blocks.h"

namespace {

inline void Update(const AdamwCoefficients& k, float clip, Vf grad, Vf& param, Vf& m, Vf& v) {
  const Vf g = clip * grad;
  m = k.beta1 * m + k.rest1 * g;
  v = k.beta2 * v + k.rest2 * g * g;
  param = k.keep * param - k.step * m / (Sqrt(k.scale2 * v) + k.eps);
}

}  // namespace

int32_t pf_cpu_adamw(const PfArgs* a) {
  PF_TRY(CheckAdamw(a));
  PF_TRY(NeedAdamwTypes(a));
  const AdamwParams& p = PfParams<AdamwParams>(a);
  const bool clipped = a->n_in > 1 && PfPresent(a->in[1]), shadowed = a->n_out > 3 && PfPresent(a->out[3]);
  const float clip = clipped ? PfData<float>(a->in[1])[1] : 1.0f;
  if (!isfinite(clip)) return PF_OK;
  const AdamwCoefficients k = MakeAdamwCoefficients(p);
  const float* grad = PfData<float>(a->in[0]);
  float *param = PfData<float>(a->out[0]), *first = PfData<float>(a->out[1]),
        *second = PfData<float>(a->out[2]);
  ForBlocks(PfCount(a->in[0]), [&](int64_t at, int64_t n) {
    for (int64_t i = at; i < at + n; i += kLanes) {
      const int64_t left = at + n - i;
      Vf x = LoadN(param + i, left), m = LoadN(first + i, left), v = LoadN(second + i, left);
      Update(k, clip, LoadN(grad + i, left), x, m, v);
      StoreN(param + i, x, left);
      StoreN(first + i, m, left);
      StoreN(second + i, v, left);
    }
    if (!shadowed) return;
    if (a->out[3].dtype == PF_F32) memcpy(PfData<float>(a->out[3]) + at, param + at, n * sizeof(float));
    EndWrite(a->out[3], at, n, param + at);
  });
  return PF_OK;
}
