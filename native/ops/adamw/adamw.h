// adamw [grad f32 [n], clip f32 [2]?] -> [+param f32 [n], +m f32 [n], +v f32 [n], +shadow bf16 [n]?],
// with g = clip[1] grad:
//   param -= lr weight_decay param (decoupled); m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
//   param -= lr (m / bias_correction1) / (sqrt(v / bias_correction2) + eps); shadow = param rounded to bf16.
// If clip[1], grad_norm's coefficient, is not finite, nothing changes.
#pragma once
#include "ops/pointwise/shape_text.h"

struct AdamwParams {
  double lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2;
};

static inline int32_t CheckAdamw(const PfArgs* a) {
  const int64_t n = PfCount(a->in[0]);
  for (int i = 0; i < 4; ++i) {
    if (i == 3 && (a->n_out < 4 || !PfPresent(a->out[3]))) break;
    if (PfCount(a->out[i]) != n || a->out[i].rank < 0)
      return Fail(a, PF_ERR_SHAPE, "adamw: expected param, m, v and shadow like grad %s, received %s",
                  ShapeText(a->in[0]).text, ShapeText(a->out[i]).text);
  }
  if (a->n_in > 1 && PfPresent(a->in[1]) && PfCount(a->in[1]) != 2)
    return Fail(a, PF_ERR_SHAPE, "adamw: expected clip [2], received %s", ShapeText(a->in[1]).text);
  return PF_OK;
}

// The small differences 1 - beta and 1 - lr wd are taken in double, before they are rounded once.
struct AdamwCoefficients {
  float beta1, beta2, rest1, rest2, keep, step, scale2, eps;
};
static inline AdamwCoefficients MakeAdamwCoefficients(const AdamwParams& p) {
  return {static_cast<float>(p.beta1),
          static_cast<float>(p.beta2),
          static_cast<float>(1 - p.beta1),
          static_cast<float>(1 - p.beta2),
          static_cast<float>(1 - p.lr * p.weight_decay),
          static_cast<float>(p.lr / p.bias_correction1),
          static_cast<float>(1 / p.bias_correction2),
          static_cast<float>(p.eps)};
}

// What the kernels ask beyond the shapes; the reference also takes f64.
static inline int32_t NeedAdamwTypes(const PfArgs* a) {
  for (int i = 0; i < 4; ++i) {
    const PfView& view = i < 3 ? a->out[i] : a->in[0];
    if (view.dtype != PF_F32)
      return Fail(a, PF_ERR_DTYPE, "adamw: expected grad, param, m and v f32, received dtype %d", view.dtype);
  }
  if (a->n_in > 1 && PfPresent(a->in[1]) && a->in[1].dtype != PF_F32)
    return Fail(a, PF_ERR_DTYPE, "adamw: expected clip f32");
  if (a->n_out > 3) return NeedFloat(a, "adamw", "shadow", a->out[3]);
  return PF_OK;
}
