// Halving and doubling of planes, shared by downsample and upsample. A thread has N blocks of 2x2 that lie
// side by side: 16 bytes of each of the two rows where that can be, four blocks of bf16 or two of f32.
#pragma once
#include "backends/cuda/packs.h"

namespace {

constexpr int kPairThreads = 256;

struct PairPlanes {
  FloatArray large, small;  // [row pairs, 2, 2w] and [row pairs, w]
  int64_t count, w;         // count = row pairs * w
  float factor;
};

// Of block `at` of all, counted along the small side: where its upper row starts.
__device__ __forceinline__ int64_t TopOfPair(const PairPlanes& p, int64_t at) {
  return 2 * (at + p.w * (at / p.w));
}

// small = factor * (2x2 block sums of large).
template <int N>
__global__ void __launch_bounds__(kPairThreads) HalveKernel(PairPlanes p) {
  constexpr int kPack = N == 1 ? 1 : 2 * N, kPacks = 2 * N / kPack;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x) * N;
  if (at >= p.count) return;
  const int64_t top = TopOfPair(p, at), low = top + 2 * p.w;
  float x[2 * kPacks][kPack], y[N];
  ReadPacks(
      p.large, [=](int k) { return k < kPacks ? top + k * kPack : low + (k - kPacks) * kPack; }, x);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int even = 2 * i / kPack, odd = (2 * i + 1) / kPack;
    y[i] = p.factor * ((x[even][2 * i % kPack] + x[kPacks + even][2 * i % kPack]) +
                       (x[odd][(2 * i + 1) % kPack] + x[kPacks + odd][(2 * i + 1) % kPack]));
  }
  WritePack<N>(p.small, at, y);
}

// large = factor * small, every value repeated into its 2x2 block.
template <int N>
__global__ void __launch_bounds__(kPairThreads) DoubleKernel(PairPlanes p) {
  constexpr int kPack = N == 1 ? 1 : 2 * N;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x) * N;
  if (at >= p.count) return;
  const int64_t top = TopOfPair(p, at), low = top + 2 * p.w;
  float x[N], y[2 * N];
  ReadPack<N>(p.small, at, x);
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) y[i] = p.factor * x[i / 2];
#pragma unroll
  for (int i = 0; i < 2 * N; i += kPack) {
    WritePack<kPack>(p.large, top + i, y + i);
    WritePack<kPack>(p.large, low + i, y + i);
  }
}

// The kernels of four blocks a thread, of two and of one.
typedef void (*PairKernel)(PairPlanes);
int32_t LaunchPairs(const PfArgs* a, PairKernel four, PairKernel two, PairKernel one, const PfView& large,
                    const PfView& small, float factor) {
  const PairPlanes p{ArrayOf(large), ArrayOf(small), PfCount(small), small.dims[small.rank - 1], factor};
  if (p.count == 0) return PF_OK;
  const int wide = large.dtype == PF_F32 ? 2 : 4;
  const int n = p.w % wide == 0 && Packs(p.large) && Packs(p.small) ? wide : 1;
  return Launch(a,
                n == 4   ? four
                : n == 2 ? two
                         : one,
                static_cast<unsigned>(CeilDiv(p.count, n * kPairThreads)), kPairThreads, 0, p);
}
int32_t HalvePlanes(const PfArgs* a, const PfView& large, const PfView& small, float factor) {
  return LaunchPairs(a, &HalveKernel<4>, &HalveKernel<2>, &HalveKernel<1>, large, small, factor);
}
int32_t DoublePlanes(const PfArgs* a, const PfView& small, const PfView& large, float factor) {
  return LaunchPairs(a, &DoubleKernel<4>, &DoubleKernel<2>, &DoubleKernel<1>, large, small, factor);
}

}  // namespace
