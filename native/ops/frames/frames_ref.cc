#include "backends/ref/ref.h"
#include "ops/frames/frames.h"

int32_t pf_ref_frames_encode(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckFrames(a, "frames_encode", x, y));
  const int64_t plane = PfProduct(x, 2, 5);
  for (int64_t i = 0; i < PfCount(y); ++i) {
    const int64_t pixel = i / 3;
    const double v = 127.5 * Get(x, (pixel / plane * 3 + i % 3) * plane + pixel % plane) + 127.5;
    Set(y, i, v != v ? 0 : trunc(fmin(fmax(v, 0), 255)));
  }
  return PF_OK;
}

int32_t pf_ref_frames_decode(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckFrames(a, "frames_decode", y, x));
  const int64_t plane = PfProduct(y, 2, 5);
  for (int64_t i = 0; i < PfCount(x); ++i) {
    const int64_t pixel = i / 3;
    Set(y, (pixel / plane * 3 + i % 3) * plane + pixel % plane, Get(x, i) / 127.5 - 1);
  }
  return PF_OK;
}
