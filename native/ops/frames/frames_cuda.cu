#include "backends/cuda/elementwise.h"
#include "ops/frames/frames.h"

namespace {

// N neighbouring pixels of a plane; N divides its size.
template <int N>
__global__ void __launch_bounds__(kElementThreads)
    Encode(FloatArray x, uint8_t* y, int64_t pixels, int64_t plane) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  if (at >= pixels) return;
  const int64_t first = at / plane * 3 * plane + at % plane;
  Pack<uint8_t, N> bytes[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    float values[N];
    ReadPack<N>(x, first + c * plane, values);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // Unfused as on the CPU: a value next to a whole number must not fall on its other side.
      const float v = __fadd_rn(__fmul_rn(127.5f, values[i]), 127.5f);
      const int k = 3 * i + c;
      bytes[k / N].of[k % N] = v >= 0 ? static_cast<uint8_t>(v < 255 ? v : 255.0f) : 0;
    }
  }
#pragma unroll
  for (int c = 0; c < 3; ++c) reinterpret_cast<Pack<uint8_t, N>*>(y + 3 * at)[c] = bytes[c];
}

__global__ void __launch_bounds__(kElementThreads)
    Decode(const uint8_t* x, FloatArray y, int64_t values, int64_t plane) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at >= values) return;
  const int64_t sample = at / (3 * plane), c = at / plane % 3, pixel = sample * plane + at % plane;
  WriteOne(y, at, static_cast<float>(x[3 * pixel + c]) / 127.5f - 1.0f);
}

}  // namespace

int32_t pf_cuda_frames_encode(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckFrames(a, "frames_encode", x, y));
  PF_TRY(NeedFloat(a, "frames_encode", "x", x));
  const int64_t plane = PfProduct(x, 2, 5), pixels = PfCount(y) / 3;
  if (pixels == 0) return PF_OK;
  const bool packs = plane % 4 == 0 && Packs(ArrayOf(x)) && Aligned(y.data, 4);
  const int64_t per_block = static_cast<int64_t>(kElementThreads) * (packs ? 4 : 1);
  return Launch(a, packs ? &Encode<4> : &Encode<1>, dim3(static_cast<unsigned>(CeilDiv(pixels, per_block))),
                kElementThreads, 0, ArrayOf(x), PfData<uint8_t>(y), pixels, plane);
}

int32_t pf_cuda_frames_decode(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckFrames(a, "frames_decode", y, x));
  PF_TRY(NeedFloat(a, "frames_decode", "y", y));
  const int64_t values = PfCount(y);
  if (values == 0) return PF_OK;
  return Launch(a, &Decode, dim3(static_cast<unsigned>(CeilDiv(values, kElementThreads))), kElementThreads, 0,
                PfData<uint8_t>(x), ArrayOf(y), values, PfProduct(y, 2, 5));
}
