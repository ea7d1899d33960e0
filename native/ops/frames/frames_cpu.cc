#include "ops/frames/frames.h"
#include "ops/pointwise/blocks.h"

// A block of pixels of all three planes is converted in plane order and interleaved in cache.

int32_t pf_cpu_frames_encode(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckFrames(a, "frames_encode", x, y));
  PF_TRY(NeedFloat(a, "frames_encode", "x", x));
  const int64_t plane = PfProduct(x, 2, 5), blocks = (plane + kBlock - 1) / kBlock;
  ForTasks(x.dims[0] * blocks, PfCount(x), [&](int64_t task) {
    alignas(64) float buffer[kBlock];
    uint8_t bytes[3][kBlock];
    const int64_t b = task / blocks, at = task % blocks * kBlock, n = MinOf(kBlock, plane - at);
    for (int c = 0; c < 3; ++c) {
      const float* p = ReadBlock(x, (b * 3 + c) * plane + at, n, buffer);
      for (int64_t i = 0; i < n; ++i) {
        const float v = 127.5f * p[i] + 127.5f;
        const float low = v > 0 ? v : 0;  // false for NaN, too
        bytes[c][i] = static_cast<uint8_t>(static_cast<int32_t>(low < 255 ? low : 255));
      }
    }
    uint8_t* out = PfData<uint8_t>(y) + (b * plane + at) * 3;
    for (int64_t i = 0; i < n; ++i)
      for (int c = 0; c < 3; ++c) out[3 * i + c] = bytes[c][i];
  });
  return PF_OK;
}

int32_t pf_cpu_frames_decode(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckFrames(a, "frames_decode", y, x));
  PF_TRY(NeedFloat(a, "frames_decode", "y", y));
  const int64_t plane = PfProduct(y, 2, 5), blocks = (plane + kBlock - 1) / kBlock;
  ForTasks(y.dims[0] * blocks, PfCount(y), [&](int64_t task) {
    alignas(64) float buffer[kBlock];
    const int64_t b = task / blocks, at = task % blocks * kBlock, n = MinOf(kBlock, plane - at);
    const uint8_t* in = PfData<uint8_t>(x) + (b * plane + at) * 3;
    for (int c = 0; c < 3; ++c) {
      const int64_t to = (b * 3 + c) * plane + at;
      float* out = BeginWrite(y, to, buffer);
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(in[3 * i + c]) / 127.5f - 1.0f;
      EndWrite(y, to, n, out);
    }
  });
  return PF_OK;
}
