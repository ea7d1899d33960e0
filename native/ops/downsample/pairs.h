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

// Sums of neighbours of 2 kLanes values of both rows, (a0 + b0) + (a1 + b1): the order is the same for both
// types.
static inline Vf BlockSums(const float* a, const float* b) {
  return PairSums(LoadF(a) + LoadF(b), LoadF(a + kLanes) + LoadF(b + kLanes));
}
static inline Vf BlockSums(const Bf16* a, const Bf16* b) {
  // Two neighbours share a 32-bit lane: no shuffle is needed to part them.
  Vu u, v;
  memcpy(&u, a, sizeof(u));
  memcpy(&v, b, sizeof(v));
  const Vf even = (Vf)(u << 16) + (Vf)(v << 16);
  return even + ((Vf)(u & 0xffff0000u) + (Vf)(v & 0xffff0000u));
}

// Every value of v twice, 2 kLanes values in all, to one row.
template <bool kStream>
static inline void PutTwice(float* y, Vf v) {
  Put<kStream>(y, TwiceLow(v));
  Put<kStream>(y + kLanes, TwiceHigh(v));
}
template <bool kStream>
static inline void PutTwice(Bf16* y, Vf v) {
  const Vu bits = Bf16Bits(v);
  Put<kStream>(y, (Vf)(bits | bits << 16));
}

// body(row pair) in tasks of about a thousand values of the small side.
template <class Body>
static inline void ForRowPairs(int64_t row_pairs, int64_t w, bool stream, Body body) {
  const int64_t group = w < 1024 ? 1024 / w : 1;
  ForTasks((row_pairs + group - 1) / group, row_pairs * w * 4, [&](int64_t task) {
    for (int64_t row = task * group; row < MinOf(row_pairs, (task + 1) * group); ++row) body(row);
    if (stream) _mm_sfence();
  });
}

template <bool kStream, class X, class Y>
static inline void Halve(const X* large, Y* small, int64_t row_pairs, int64_t w, float factor) {
  ForRowPairs(row_pairs, w, kStream, [=](int64_t row) {
    const X *a = large + row * 4 * w, *b = a + 2 * w;
    Y* y = small + row * w;
    int64_t j = 0;
    for (; j + kLanes <= w; j += kLanes) {
      const Vf v = factor * BlockSums(a + 2 * j, b + 2 * j);
      if constexpr (kStream && sizeof(Y) == sizeof(float))
        Put<true>(y + j, v);
      else
        StoreF(y + j, v);
    }
    for (; j < w; ++j) {
      const float even = ToFloat(a[2 * j]) + ToFloat(b[2 * j]);
      y[j] = FromFloat<Y>(factor * (even + (ToFloat(a[2 * j + 1]) + ToFloat(b[2 * j + 1]))));
    }
  });
}

template <bool kStream, class X, class Y>
static inline void Double(const X* small, Y* large, int64_t row_pairs, int64_t w, float factor) {
  ForRowPairs(row_pairs, w, kStream, [=](int64_t row) {
    const X* x = small + row * w;
    Y *top = large + row * 4 * w, *low = top + 2 * w;
    int64_t j = 0;
    for (; j + kLanes <= w; j += kLanes) {
      const Vf v = factor * LoadF(x + j);
      PutTwice<kStream>(top + 2 * j, v);
      PutTwice<kStream>(low + 2 * j, v);
    }
    for (; j < w; ++j)
      top[2 * j] = top[2 * j + 1] = low[2 * j] = low[2 * j + 1] = FromFloat<Y>(factor * ToFloat(x[j]));
  });
}

// small = factor * (2x2 block sums of large), large [count, 2h, 2w].
static inline void HalvePlanes(const PfView& large, const PfView& small, int64_t row_pairs, int64_t w,
                               float factor) {
  PF_FLOAT_DISPATCH(large, X, PF_FLOAT_DISPATCH(small, Y, {
                      const X* x = PfData<X>(large);
                      Y* y = PfData<Y>(small);
                      if (WorthStreaming(y, row_pairs * w * sizeof(Y), w * sizeof(Y)))
                        Halve<true>(x, y, row_pairs, w, factor);
                      else
                        Halve<false>(x, y, row_pairs, w, factor);
                    }););
}
// large = factor * small, every value repeated into its 2x2 block.
static inline void DoublePlanes(const PfView& small, const PfView& large, int64_t row_pairs, int64_t w,
                                float factor) {
  PF_FLOAT_DISPATCH(small, X, PF_FLOAT_DISPATCH(large, Y, {
                      const X* x = PfData<X>(small);
                      Y* y = PfData<Y>(large);
                      if (WorthStreaming(y, 4 * row_pairs * w * sizeof(Y), 2 * w * sizeof(Y)))
                        Double<true>(x, y, row_pairs, w, factor);
                      else
                        Double<false>(x, y, row_pairs, w, factor);
                    }););
}
