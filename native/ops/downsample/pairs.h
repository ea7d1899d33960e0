// Halving and doubling of rows in registers, shared by downsample, upsample and renoise.
#pragma once
#include "ops/pointwise/blocks.h"

#if PF_LANES == 16
static constexpr Vi kEven = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
static constexpr Vi kTwiceLow = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7};
static constexpr Vi kSwap = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
#elif PF_LANES == 8
static constexpr Vi kEven = {0, 2, 4, 6, 8, 10, 12, 14};
static constexpr Vi kTwiceLow = {0, 0, 1, 1, 2, 2, 3, 3};
static constexpr Vi kSwap = {1, 0, 3, 2, 5, 4, 7, 6};
#else
static constexpr Vi kEven = {0, 2, 4, 6};
static constexpr Vi kTwiceLow = {0, 0, 1, 1};
static constexpr Vi kSwap = {1, 0, 3, 2};
#endif

static inline Vf SwapPairs(Vf v) { return __builtin_shuffle(v, kSwap); }
// v0 v0 v1 v1 .. of the lower or the upper half of v.
static inline Vf TwiceLow(Vf v) { return __builtin_shuffle(v, kTwiceLow); }
static inline Vf TwiceHigh(Vf v) { return __builtin_shuffle(v, kTwiceLow + kLanes / 2); }
// Sums of neighbours of the 2 kLanes values a, b.
static inline Vf PairSums(Vf a, Vf b) {
  return __builtin_shuffle(a, b, kEven) + __builtin_shuffle(a, b, kEven + 1);
}

// y[j] = factor * (the 2x2 block j of rows a and b), j < n.
static inline void HalveRows(const float* a, const float* b, int64_t n, float factor, float* y) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vf low = LoadF(a + 2 * j) + LoadF(b + 2 * j);
    const Vf high = LoadF(a + 2 * j + kLanes) + LoadF(b + 2 * j + kLanes);
    StoreF(y + j, factor * PairSums(low, high));
  }
  for (; j < n; ++j) y[j] = factor * ((a[2 * j] + b[2 * j]) + (a[2 * j + 1] + b[2 * j + 1]));
}
// y[2j] = y[2j + 1] = factor * x[j], j < n.
static inline void DoubleRow(const float* x, int64_t n, float factor, float* y) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vf v = factor * LoadF(x + j);
    StoreF(y + 2 * j, TwiceLow(v));
    StoreF(y + 2 * j + kLanes, TwiceHigh(v));
  }
  for (; j < n; ++j) y[2 * j] = y[2 * j + 1] = factor * x[j];
}

// small = factor * (2x2 block sums of large), large [count, 2h, 2w]. Row pairs are tasks, long rows go in
// pieces.
static inline void HalvePlanes(const PfView& large, const PfView& small, int64_t row_pairs, int64_t w,
                               float factor) {
  const int64_t group = w < 1024 ? 1024 / w : 1;
  ForTasks((row_pairs + group - 1) / group, row_pairs * w * 4, [&](int64_t task) {
    alignas(64) float top[kBlock], low[kBlock], out[kBlock / 2];
    for (int64_t row = task * group; row < MinOf(row_pairs, (task + 1) * group); ++row) {
      for (int64_t c = 0; c < w; c += kBlock / 2) {
        const int64_t n = MinOf(kBlock / 2, w - c), from = row * 4 * w + 2 * c, to = row * w + c;
        float* y = BeginWrite(small, to, out);
        HalveRows(ReadBlock(large, from, 2 * n, top), ReadBlock(large, from + 2 * w, 2 * n, low), n, factor,
                  y);
        EndWrite(small, to, n, y);
      }
    }
  });
}
// large = factor * small, every value repeated into its 2x2 block.
static inline void DoublePlanes(const PfView& small, const PfView& large, int64_t row_pairs, int64_t w,
                                float factor) {
  const int64_t group = w < 1024 ? 1024 / w : 1;
  ForTasks((row_pairs + group - 1) / group, row_pairs * w * 4, [&](int64_t task) {
    alignas(64) float in[kBlock / 2], out[kBlock];
    for (int64_t row = task * group; row < MinOf(row_pairs, (task + 1) * group); ++row) {
      for (int64_t c = 0; c < w; c += kBlock / 2) {
        const int64_t n = MinOf(kBlock / 2, w - c), to = row * 4 * w + 2 * c;
        DoubleRow(ReadBlock(small, row * w + c, n, in), n, factor, out);
        for (int64_t at = to; at <= to + 2 * w; at += 2 * w) {
          if (large.dtype == PF_F32) memcpy(PfData<float>(large) + at, out, 2 * n * sizeof(float));
          EndWrite(large, at, 2 * n, out);
        }
      }
    }
  });
}
