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
