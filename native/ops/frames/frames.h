// frames_encode [x [B, 3, T, H, W]] -> [u8 [B, T, H, W, 3]]: trunc(clamp(127.5 x + 127.5, 0, 255)), NaN
// becomes 0. frames_decode [u8 [B, T, H, W, 3]] -> [y [B, 3, T, H, W]]: v / 127.5 - 1.
#pragma once
#include "ops/pointwise/shape_text.h"

static inline int32_t CheckFrames(const PfArgs* a, const char* op, const PfView& planes,
                                  const PfView& bytes) {
  const int64_t *p = planes.dims, *b = bytes.dims;
  if (planes.rank != 5 || bytes.rank != 5 || p[1] != 3 || b[4] != 3 || p[0] != b[0] || p[2] != b[1] ||
      p[3] != b[2] || p[4] != b[3])
    return Fail(a, PF_ERR_SHAPE, "%s: expected [B, 3, T, H, W] and [B, T, H, W, 3], received %s and %s", op,
                ShapeText(planes).text, ShapeText(bytes).text);
  if (bytes.dtype != PF_U8)
    return Fail(a, PF_ERR_DTYPE, "%s: expected u8 frames, received dtype %d", op, bytes.dtype);
  return PF_OK;
}
