// patchify [x [B, C, T, H, W]] -> [+y [N, 4C]]: latents to token rows, H and W even,
//   y[row_offset + b row_stride + (t H/2 + i) W/2 + j, (py 2 + px) C + c] = x[b, c, t, 2i + py, 2j + px];
// other rows of y stay as they are. unpatchify [x [N, 4C]] -> [y [B, C, T, H, W]] reads the same way back.
#pragma once
#include "core/half.h"
#include "ops/pointwise/shape_text.h"

struct PatchifyParams {
  double row_offset, row_stride;
};

struct Patches {
  int64_t b, c, t, h, w, row_offset, row_stride;  // h, w in tokens

  // Token row of image row i (of B T h), and the latent element it starts at for channel c.
  PF_HD int64_t Row(int64_t i) const { return row_offset + i / (t * h) * row_stride + i % (t * h) * w; }
  PF_HD int64_t Element(int64_t i, int64_t channel) const {
    const int64_t batch = i / (t * h), rest = i % (t * h);
    return ((batch * c + channel) * t + rest / h) * 4 * h * w + rest % h * 4 * w;
  }
};

static inline int32_t MakePatches(const PfArgs* a, const char* op, const PfView& latent, const PfView& rows,
                                  Patches* p) {
  const PatchifyParams& params = PfParams<PatchifyParams>(a);
  const int64_t* d = latent.dims;
  if (latent.rank != 5 || rows.rank < 2 || d[3] % 2 || d[4] % 2 || rows.dims[rows.rank - 1] != 4 * d[1])
    return Fail(a, PF_ERR_SHAPE,
                "%s: expected [B, C, T, H, W] with even H, W and [N, 4 C], received %s and %s", op,
                ShapeText(latent).text, ShapeText(rows).text);
  *p = {d[0],
        d[1],
        d[2],
        d[3] / 2,
        d[4] / 2,
        static_cast<int64_t>(params.row_offset),
        static_cast<int64_t>(params.row_stride)};
  const int64_t count = p->t * p->h * p->w, n = PfProduct(rows, 0, rows.rank - 1);
  const int64_t last = p->row_offset + (p->b - 1) * p->row_stride + count;
  if (p->b > 0 && (p->row_offset < 0 || p->row_stride < 0 || last > n))
    return Fail(a, PF_ERR_SHAPE, "%s: %lld rows from %lld, stride %lld, do not fit %s", op,
                static_cast<long long>(count), static_cast<long long>(p->row_offset),
                static_cast<long long>(p->row_stride), ShapeText(rows).text);
  return PF_OK;
}
