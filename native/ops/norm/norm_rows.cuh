// How rows of any length are laid over threads, and kept in registers where they fit.
#pragma once
#include "backends/cuda/column_sums.h"
#include "backends/cuda/packs.h"

namespace {

// kThreads share a row; each has kPacks packs of N elements, kThreads packs apart. kWhole: that is the whole
// row; otherwise the row is walked in segments, once for every pass.
template <int kThreads_, int N_, int kPacks_, bool kWhole_ = true>
struct RowLayout {
  static constexpr int kThreads = kThreads_, N = N_, kPacks = kPacks_;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kBlock = kThreads == 32 ? 128 : kThreads, kRowsPerBlock = kBlock / kThreads;
  static constexpr int kSegment = kThreads * N * kPacks;
};

// First element of this thread's pack k in the segment at `base` of a row that starts at `row`; -1 behind the
// end of the row.
template <class L>
struct PackPlaces {
  int64_t row;
  int base, d;
  __device__ int64_t operator()(int k) const {
    const int i = base + (k * L::kThreads + static_cast<int>(threadIdx.x) % L::kThreads) * L::N;
    return i < d ? row + i : -1;
  }
};

// body(base) for the segments of a row.
template <class L, class Body>
__device__ __forceinline__ void ForSegments(int d, Body body) {
  if constexpr (L::kWhole) {
    body(0);
  } else {
    for (int base = 0; base < d; base += L::kSegment) body(base);
  }
}

// The sums over the threads of a row, of K values at once.
template <class L, int K>
__device__ __forceinline__ void RowTotals(float (&x)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = WarpSum(x[k]);
  if constexpr (L::kThreads > 32) {
    constexpr int kWarps = L::kThreads / 32;
    __shared__ float of_warp[K][kWarps];
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (threadIdx.x % 32 == 0) of_warp[k][threadIdx.x / 32] = x[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x[k] = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) x[k] += of_warp[k][i];
    }
    __syncthreads();
  }
}

template <class L, class At>
__device__ __forceinline__ void WritePacks(const FloatArray& v, At at, const float (&from)[L::kPacks][L::N]) {
#pragma unroll
  for (int k = 0; k < L::kPacks; ++k)
    if (at(k) >= 0) WritePack<L::N>(v, at(k), from[k]);
}

// fn(layout) with the layout for rows of d elements; packs: 16-byte accesses are possible.
template <class Fn>
int32_t WithRowLayout(int64_t d, bool packs, Fn fn) {
  if (packs && d % 8 == 0) {
    if (d <= 256) return fn(RowLayout<32, 8, 1>{});
    if (d <= 512) return fn(RowLayout<32, 8, 2>{});
    if (d <= 1024) return fn(RowLayout<64, 8, 2>{});
    if (d <= 1536) return fn(RowLayout<96, 8, 2>{});
    if (d <= 2048) return fn(RowLayout<128, 8, 2>{});
    if (d <= 4096) return fn(RowLayout<256, 8, 2>{});
    return fn(RowLayout<256, 8, 2, false>{});
  }
  if (d <= 128) return fn(RowLayout<32, 1, 4>{});
  if (d <= 2048) return fn(RowLayout<256, 1, 8>{});
  return fn(RowLayout<256, 1, 8, false>{});
}

}  // namespace
