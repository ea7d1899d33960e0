// Halving and doubling of planes on the GPU, shared by downsample and upsample: a thread takes N neighbours
// of the small side and the 2 x 2N of the large side. `small` runs over [row pairs, w]; N divides w, so no
// pack leaves its row.
#pragma once
#include "backends/cuda/elementwise.h"

// Where the upper row of the blocks of small element `at` begins; the lower is 2 w further.
PF_HD static inline int64_t BlockTop(int64_t at, int64_t w) { return at + at / w * 3 * w + at % w; }

template <int N>
__global__ void __launch_bounds__(kElementThreads)
    HalveKernel(FloatArray large, FloatArray small, int64_t n, int64_t w, float factor) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  if (at >= n) return;
  float a[2 * N], b[2 * N], y[N];
  const int64_t top = BlockTop(at, w);
  ReadPack<2 * N>(large, top, a);
  ReadPack<2 * N>(large, top + 2 * w, b);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = factor * ((a[2 * i] + b[2 * i]) + (a[2 * i + 1] + b[2 * i + 1]));
  WritePack<N>(small, at, y);
}

template <int N>
__global__ void __launch_bounds__(kElementThreads)
    DoubleKernel(FloatArray small, FloatArray large, int64_t n, int64_t w, float factor) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  if (at >= n) return;
  float x[N], y[2 * N];
  ReadPack<N>(small, at, x);
#pragma unroll
  for (int i = 0; i < N; ++i) y[2 * i] = y[2 * i + 1] = factor * x[i];
  const int64_t top = BlockTop(at, w);
  WritePack<2 * N>(large, top, y);
  WritePack<2 * N>(large, top + 2 * w, y);
}

static inline dim3 PairGrid(int64_t n, int per_thread) {
  return dim3(static_cast<unsigned>(CeilDiv(n, static_cast<int64_t>(kElementThreads) * per_thread)));
}

// small = factor * (2x2 block sums of large), large [.., 2h, 2w].
static inline int32_t HalvePlanes(const PfArgs* a, const PfView& large, const PfView& small, int64_t w,
                                  float factor) {
  const int64_t n = PfCount(small);
  if (n == 0) return PF_OK;
  const FloatArray from = ArrayOf(large), to = ArrayOf(small);
  if (w % 4 == 0 && Packs(from) && Packs(to))
    return Launch(a, &HalveKernel<4>, PairGrid(n, 4), kElementThreads, 0, from, to, n, w, factor);
  return Launch(a, &HalveKernel<1>, PairGrid(n, 1), kElementThreads, 0, from, to, n, w, factor);
}
// large = factor * small, every value repeated into its 2x2 block.
static inline int32_t DoublePlanes(const PfArgs* a, const PfView& small, const PfView& large, int64_t w,
                                   float factor) {
  const int64_t n = PfCount(small);
  if (n == 0) return PF_OK;
  const FloatArray from = ArrayOf(small), to = ArrayOf(large);
  if (w % 4 == 0 && Packs(from) && Packs(to))
    return Launch(a, &DoubleKernel<4>, PairGrid(n, 4), kElementThreads, 0, from, to, n, w, factor);
  return Launch(a, &DoubleKernel<1>, PairGrid(n, 1), kElementThreads, 0, from, to, n, w, factor);
}
