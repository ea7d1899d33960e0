#include "backends/ref/ref.h"
#include "ops/conv3d/conv3d.h"

namespace {

// Calls term(x index, w index, y index) for every product of the convolution that is not with a padding zero,
// grouped by y position and output channel.
template <class Term>
void EveryProduct(const Conv3dShape& s, const Term& term) {
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.out[0]; ++t)
      for (int64_t i = 0; i < s.out[1]; ++i)
        for (int64_t j = 0; j < s.out[2]; ++j)
          for (int64_t o = 0; o < s.c_out; ++o)
            for (int64_t p = 0; p < s.kernel[0]; ++p)
              for (int64_t q = 0; q < s.kernel[1]; ++q)
                for (int64_t r = 0; r < s.kernel[2]; ++r) {
                  const int64_t xt = t * s.stride[0] + p - s.pad[0], xi = i * s.stride[1] + q - s.pad[1],
                                xj = j * s.stride[2] + r - s.pad[2];
                  if (xt < 0 || xt >= s.in[0] || xi < 0 || xi >= s.in[1] || xj < 0 || xj >= s.in[2]) continue;
                  for (int64_t c = 0; c < s.c_in; ++c)
                    term((((b * s.in[0] + xt) * s.in[1] + xi) * s.in[2] + xj) * s.c_in + c,
                         (((o * s.c_in + c) * s.kernel[0] + p) * s.kernel[1] + q) * s.kernel[2] + r,
                         (((b * s.out[0] + t) * s.out[1] + i) * s.out[2] + j) * s.c_out + o);
                }
}

}  // namespace

// The runner's outputs are double, so adding term by term loses nothing.
int32_t pf_ref_conv3d(const PfArgs* a) {
  const PfView &x = a->in[0], &w = a->in[1], &bias = a->in[2], &y = a->out[0];
  Conv3dShape s{};
  const int32_t status = GetConv3dShape(a, "conv3d", x, w, y, &bias, &s);
  if (status != PF_OK) return status;
  for (int64_t i = 0; i < PfCount(y); ++i) Set(y, i, PfPresent(bias) ? Get(bias, i % s.c_out) : 0);
  EveryProduct(s,
               [&](int64_t xi, int64_t wi, int64_t yi) { Set(y, yi, Get(y, yi) + Get(x, xi) * Get(w, wi)); });
  return PF_OK;
}

int32_t pf_ref_conv3d_backward_data(const PfArgs* a) {
  const PfView &dy = a->in[0], &w = a->in[1], &dx = a->out[0];
  Conv3dShape s{};
  const int32_t status = GetConv3dShape(a, "conv3d_backward_data", dx, w, dy, nullptr, &s);
  if (status != PF_OK) return status;
  for (int64_t i = 0; i < PfCount(dx); ++i) Set(dx, i, 0);
  EveryProduct(
      s, [&](int64_t xi, int64_t wi, int64_t yi) { Set(dx, xi, Get(dx, xi) + Get(dy, yi) * Get(w, wi)); });
  return PF_OK;
}

int32_t pf_ref_conv3d_backward_weights(const PfArgs* a) {
  const PfView &x = a->in[0], &dy = a->in[1], &dw = a->out[0], &db = a->out[1];
  Conv3dShape s{};
  const int32_t status = GetConv3dShape(a, "conv3d_backward_weights", x, dw, dy, &db, &s);
  if (status != PF_OK) return status;
  if (PfParams<Conv3dParams>(a).accumulate == 0) {
    for (int64_t i = 0; i < PfCount(dw); ++i) Set(dw, i, 0);
    for (int64_t i = 0; PfPresent(db) && i < s.c_out; ++i) Set(db, i, 0);
  }
  EveryProduct(
      s, [&](int64_t xi, int64_t wi, int64_t yi) { Set(dw, wi, Get(dw, wi) + Get(x, xi) * Get(dy, yi)); });
  for (int64_t i = 0; PfPresent(db) && i < PfCount(dy); ++i)
    Set(db, i % s.c_out, Get(db, i % s.c_out) + Get(dy, i));
  return PF_OK;
}
