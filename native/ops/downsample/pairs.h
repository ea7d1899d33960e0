// Halving and doubling of rows in registers, shared by downsample, upsample and renoise.
#pragma once
#include "ops/pointwise/blocks.h"

// Sums of neighbours of the 2 kLanes values a, b.
static inline Vf PairSums(Vf a, Vf b) {
  return __builtin_shuffle(a, b, 2 * kLaneIndex) + __builtin_shuffle(a, b, 2 * kLaneIndex + 1);
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
static inline void PutTwice(float* y, Vf v) {
  StoreF(y, TwiceLow(v));
  StoreF(y + kLanes, TwiceHigh(v));
}
static inline void PutTwice(Bf16* y, Vf v) {
  const Vu bits = Bf16Bits(v), both = bits | bits << 16;
  memcpy(y, &both, sizeof(both));
}

static inline void RepeatBits(const Bf16* x, void* y) {
  Vh h;
  memcpy(&h, x, sizeof(h));
  const Vu bits = Widen(h), both = bits | bits << 16;
  memcpy(y, &both, sizeof(both));
}

// body(row pair) in tasks of about a thousand values of the small side.
template <class Body>
static inline void ForRowPairs(int64_t row_pairs, int64_t w, Body body) {
  const int64_t group = w < 1024 ? 1024 / w : 1;
  ForTasks((row_pairs + group - 1) / group, row_pairs * w * 4, [&](int64_t task) {
    for (int64_t row = task * group; row < MinOf(row_pairs, (task + 1) * group); ++row) body(row);
  });
}

template <class X, class Y>
static inline void Halve(const X* large, Y* small, int64_t row_pairs, int64_t w, float factor) {
  // Two streams of short rows are more than the hardware foresees: in bf16 half as fast without the hint.
  constexpr int64_t kAhead = 4096 / sizeof(X);
  ForRowPairs(row_pairs, w, [=](int64_t row) {
    const X *a = large + row * 4 * w, *b = a + 2 * w;
    Y* y = small + row * w;
    const auto sums = [=](int64_t j) {
      if (sizeof(X) == sizeof(Bf16)) {
        __builtin_prefetch(a + 2 * j + kAhead);
        __builtin_prefetch(b + 2 * j + kAhead);
      }
      return factor * BlockSums(a + 2 * j, b + 2 * j);
    };
    int64_t j = 0;
    for (; j + 2 * kLanes <= w; j += 2 * kLanes) StorePair(y + j, sums(j), sums(j + kLanes));
    for (; j + kLanes <= w; j += kLanes) StoreF(y + j, sums(j));
    for (; j < w; ++j) {
      const float even = ToFloat(a[2 * j]) + ToFloat(b[2 * j]);
      y[j] = FromFloat<Y>(factor * (even + (ToFloat(a[2 * j + 1]) + ToFloat(b[2 * j + 1]))));
    }
  });
}

template <class X, class Y>
static inline void Double(const X* small, Y* large, int64_t row_pairs, int64_t w, float factor) {
  ForRowPairs(row_pairs, w, [=](int64_t row) {
    const X* x = small + row * w;
    // One row after the other: written in turns the two are half as fast, past the caches slower than either.
    for (int k = 0; k < 2; ++k) {
      Y* y = large + (2 * row + k) * 2 * w;
      // Lines come to be written before they are: the order of stores leaves too little time for that.
      constexpr int64_t kAhead = 512 / sizeof(Y), kLine = 64 / sizeof(Y);
      const auto ahead = [=](int64_t j) {
        for (int64_t i = 2 * j; i < 2 * (j + kLanes); i += kLine) __builtin_prefetch(y + i + kAhead, 1);
      };
      int64_t j = 0;
      if (sizeof(X) == sizeof(Bf16) && sizeof(Y) == sizeof(Bf16) && factor == 1)
        for (; j + kLanes <= w; j += kLanes) {
          ahead(j);
          RepeatBits(reinterpret_cast<const Bf16*>(x) + j, y + 2 * j);
        }
      for (; j + kLanes <= w; j += kLanes) {
        ahead(j);
        PutTwice(y + 2 * j, factor * LoadF(x + j));
      }
      for (; j < w; ++j) y[2 * j] = y[2 * j + 1] = FromFloat<Y>(factor * ToFloat(x[j]));
    }
  });
}

// small = factor * (2x2 block sums of large), large [count, 2h, 2w].
static inline void HalvePlanes(const PfView& large, const PfView& small, int64_t row_pairs, int64_t w,
                               float factor) {
  PF_FLOAT_DISPATCH(large, X, PF_FLOAT_DISPATCH(small, Y, {
                      Halve(PfData<X>(large), PfData<Y>(small), row_pairs, w, factor);
                    }););
}
// large = factor * small, every value repeated into its 2x2 block.
static inline void DoublePlanes(const PfView& small, const PfView& large, int64_t row_pairs, int64_t w,
                                float factor) {
  PF_FLOAT_DISPATCH(small, X, PF_FLOAT_DISPATCH(large, Y, {
                      Double(PfData<X>(small), PfData<Y>(large), row_pairs, w, factor);
                    }););
}
