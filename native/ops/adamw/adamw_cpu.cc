#include "ops/adamw/adamw.h"
#include "ops/pointwise/blocks.h"

namespace {

struct Coefficients {
  float clip, beta1, beta2, rest1, rest2, keep, step, scale2, eps;
};

inline void Update(const Coefficients& k, Vf grad, Vf& param, Vf& m, Vf& v) {
  const Vf g = k.clip * grad;
  m = k.beta1 * m + k.rest1 * g;
  v = k.beta2 * v + k.rest2 * g * g;
  param = k.keep * param - k.step * m / (Sqrt(k.scale2 * v) + k.eps);
}

}  // namespace

int32_t pf_cpu_adamw(const PfArgs* a) {
  PF_TRY(CheckAdamw(a));
  for (int i = 0; i < 4; ++i) {
    const PfView& view = i < 3 ? a->out[i] : a->in[0];
    if (view.dtype != PF_F32)
      return Fail(a, PF_ERR_DTYPE, "adamw: expected grad, param, m and v f32, received dtype %d", view.dtype);
  }
  const AdamwParams& p = PfParams<AdamwParams>(a);
  const bool clipped = a->n_in > 1 && PfPresent(a->in[1]), shadowed = a->n_out > 3 && PfPresent(a->out[3]);
  if (clipped && a->in[1].dtype != PF_F32) return Fail(a, PF_ERR_DTYPE, "adamw: expected clip f32");
  if (shadowed) PF_TRY(NeedFloat(a, "adamw", "shadow", a->out[3]));
  const float clip = clipped ? PfData<float>(a->in[1])[1] : 1.0f;
  if (!isfinite(clip)) return PF_OK;
  // The small differences 1 - beta and 1 - lr wd are taken in double, before they are rounded once.
  const Coefficients k = {clip,
                          static_cast<float>(p.beta1),
                          static_cast<float>(p.beta2),
                          static_cast<float>(1 - p.beta1),
                          static_cast<float>(1 - p.beta2),
                          static_cast<float>(1 - p.lr * p.weight_decay),
                          static_cast<float>(p.lr / p.bias_correction1),
                          static_cast<float>(1 / p.bias_correction2),
                          static_cast<float>(p.eps)};
  const float* grad = PfData<float>(a->in[0]);
  float *param = PfData<float>(a->out[0]), *first = PfData<float>(a->out[1]),
        *second = PfData<float>(a->out[2]);
  ForBlocks(PfCount(a->in[0]), [&](int64_t at, int64_t n) {
    for (int64_t i = at; i < at + n; i += kLanes) {
      const int64_t left = at + n - i;
      Vf x = LoadN(param + i, left), m = LoadN(first + i, left), v = LoadN(second + i, left);
      Update(k, LoadN(grad + i, left), x, m, v);
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
