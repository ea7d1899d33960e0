// Causal 3-D convolution, channels last.
//
// conv3d                   x [B, T, H, W, Cin], w [Cout, Cin, kt, kh, kw], bias? [Cout] -> y [B, T', H', W',
// Cout]
//                          y[b,t,i,j,o] = bias[o] + sum w[o,c,p,q,r] x[b, t st + p - pad_t, i sh + q - pad_h,
//                          j sw + r - pad_w, c], x being 0 outside.
// conv3d_backward_data     dy, w -> dx
// conv3d_backward_weights  x, dy -> +dw f32, +dbias? f32
// pad_t frames of zeros stand in front only (no frame sees a later one); pad_h and pad_w on both sides.
// T' = (T + pad_t - kt) / st + 1, H' = (H + 2 pad_h - kh) / sh + 1, W' likewise, rounded down.
#pragma once
#include "core/check.h"

struct Conv3dParams {
  double stride[3], pad[3], accumulate;  // accumulate: backward_weights only
};

struct Conv3dShape {
  int64_t batch, c_in, c_out;
  int64_t in[3], out[3], kernel[3], stride[3], pad[3];
};

// x, y and w are read for their dims only, whichever of them the op computes.
static inline int32_t GetConv3dShape(const PfArgs* a, const char* op, const PfView& x, const PfView& w,
                                     const PfView& y, const PfView* bias, Conv3dShape* s) {
  const Conv3dParams& p = PfParams<Conv3dParams>(a);
  if (x.rank != 5 || w.rank != 5 || y.rank != 5)
    return Fail(a, PF_ERR_SHAPE,
                "%s: expected x and y [B, T, H, W, C] and w [Cout, Cin, kt, kh, kw], ranks are %d, %d, %d",
                op, x.rank, y.rank, w.rank);
  s->batch = x.dims[0];
  s->c_in = x.dims[4];
  s->c_out = w.dims[0];
  if (w.dims[1] != s->c_in || y.dims[4] != s->c_out || y.dims[0] != s->batch)
    return Fail(a, PF_ERR_SHAPE,
                "%s: channels or batch differ: x [%lld, .., %lld], w [%lld, %lld, ..], y [%lld, .., %lld]",
                op, (long long)x.dims[0], (long long)x.dims[4], (long long)w.dims[0], (long long)w.dims[1],
                (long long)y.dims[0], (long long)y.dims[4]);
  if (s->c_in < 1 || s->c_out < 1) return Fail(a, PF_ERR_SHAPE, "%s: there are no channels", op);
  for (int i = 0; i < 3; ++i) {
    s->in[i] = x.dims[1 + i];
    s->out[i] = y.dims[1 + i];
    s->kernel[i] = w.dims[2 + i];
    s->stride[i] = static_cast<int64_t>(p.stride[i]);
    s->pad[i] = static_cast<int64_t>(p.pad[i]);
    // More padding than kernel would make outputs that see no input at all.
    if (s->stride[i] < 1 || s->pad[i] < 0 || s->pad[i] >= s->kernel[i])
      return Fail(a, PF_ERR_OPTION,
                  "%s: expected stride >= 1 and 0 <= pad < kernel, received %g and %g for kernel %lld", op,
                  p.stride[i], p.pad[i], (long long)s->kernel[i]);
    const int64_t room = s->in[i] + s->pad[i] * (i ? 2 : 1) - s->kernel[i];
    const int64_t out = room < 0 ? 0 : room / s->stride[i] + 1;
    if (out < 1 || out != s->out[i])
      return Fail(a, PF_ERR_SHAPE,
                  "%s: axis %d of y is %lld; input %lld, kernel %lld, stride %lld and pad %lld give %lld", op,
                  1 + i, (long long)s->out[i], (long long)s->in[i], (long long)s->kernel[i],
                  (long long)s->stride[i], (long long)s->pad[i], (long long)out);
  }
  if (bias && PfPresent(*bias) && PfCount(*bias) != s->c_out)
    return Fail(a, PF_ERR_SHAPE, "%s: expected bias [%lld], received %lld values", op, (long long)s->c_out,
                (long long)PfCount(*bias));
  return PF_OK;
}

static inline int32_t CheckConv3dFloats(const PfArgs* a, const char* op, const PfView& x, const PfView& y) {
  if (PfIsFloat(x) && PfIsFloat(y)) return PF_OK;
  return Fail(a, PF_ERR_DTYPE, "%s: operands are f32 or bf16, received dtypes %d and %d", op, x.dtype,
              y.dtype);
}
// A gradient that is summed up is f32.
static inline int32_t CheckConv3dGradients(const PfArgs* a, const char* op, const PfView& dw,
                                           const PfView& dbias) {
  if (dw.dtype == PF_F32 && (!PfPresent(dbias) || dbias.dtype == PF_F32)) return PF_OK;
  return Fail(a, PF_ERR_DTYPE, "%s: dw and dbias are f32", op);
}
