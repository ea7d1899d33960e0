// Halving and doubling of rows in registers, shared by downsample, upsample and renoise.
#pragma once
#include "ops/pointwise/blocks.h"

// Sums of neighbours of the 2 kLanes values a, b.
static inline Vf PairSums(Vf a, Vf b) {
#if PF_LANES == 8
  // Sums first, then one crossing of the 128-bit halves.
  const __m256 even = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  const __m256 odd = _mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
  return (Vf)_mm256_permute4x64_pd((__m256d)(even + odd), 0xd8);
#else
  return __builtin_shuffle(a, b, 2 * kLaneIndex) + __builtin_shuffle(a, b, 2 * kLaneIndex + 1);
#endif
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
static inline Vf BlockSums(const Bf16* a, const Bf16* b, Vu upper = Vu{} + 0xffff0000u) {
  // Two neighbours share a 32-bit lane: no shuffle is needed to part them.
  Vu u, v;
  memcpy(&u, a, sizeof(u));
  memcpy(&v, b, sizeof(v));
  PF_KEEP(u);  // else both uses below load it again
  PF_KEEP(v);
  const Vf even = (Vf)(u << 16) + (Vf)(v << 16);
  return even + ((Vf)(u & upper) + (Vf)(v & upper));
}

// One vector to p; kStream: past the caches, without fetching what it overwrites, p aligned to the vector.
template <bool kStream>
static inline void PutVector(void* p, Vf v) {
  if constexpr (!kStream)
    memcpy(p, &v, sizeof(v));
  else
#if PF_LANES == 16
    _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif PF_LANES == 8
    _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#else
    memcpy(p, &v, sizeof(v));
#endif
}
static inline void StreamPair(float* p, Vf a, Vf b) {
  PutVector<true>(p, a);
  PutVector<true>(p + kLanes, b);
}
static inline void StreamPair(Bf16* p, Vf a, Vf b) { PutVector<true>(p, Bf16Packed(a, b)); }
// Every value of v twice, 2 kLanes values in all, to one row.
template <bool kStream = false>
static inline void PutTwice(float* y, Vf v) {
  PutVector<kStream>(y, TwiceLow(v));
  PutVector<kStream>(y + kLanes, TwiceHigh(v));
}
template <bool kStream = false>
static inline void PutTwice(Bf16* y, Vf v) {
  const Vu bits = Bf16Bits(v), both = bits | bits << 16;
  PutVector<kStream>(y, (Vf)both);
}

// y[2i] = y[2i + 1] = x[i], i < 2 kLanes.
template <bool kStream = false>
static inline void RepeatBits(const Bf16* x, Bf16* y) {
#if PF_LANES == 8
  __m256i v;
  memcpy(&v, x, sizeof(v));
  v = _mm256_permute4x64_epi64(v, 0xd8);  // unpacking does not cross the 128-bit halves
  PutVector<kStream>(y, (Vf)_mm256_unpacklo_epi16(v, v));
  PutVector<kStream>(y + 2 * kLanes, (Vf)_mm256_unpackhi_epi16(v, v));
#else
  for (int i = 0; i < 2 * kLanes; i += kLanes) {
    Vh h;
    memcpy(&h, x + i, sizeof(h));
    const Vu bits = Widen(h), both = bits | bits << 16;
    PutVector<kStream>(y + 2 * i, (Vf)both);
  }
#endif
}

// body(first row pair, their number) in tasks of about a thousand values of the small side; then by the pair.
template <class Body>
static inline void ForRowGroups(int64_t row_pairs, int64_t w, Body body) {
  const int64_t group = w < 1024 ? 1024 / w : 1;
  ForTasks((row_pairs + group - 1) / group, row_pairs * w * 4, [&](int64_t task) {
    const int64_t row = task * group;
    body(row, MinOf(row_pairs - row, group));
  });
}
template <class Body>
static inline void ForRowPairs(int64_t row_pairs, int64_t w, Body body) {
  ForRowGroups(row_pairs, w, [=](int64_t row, int64_t rows) {
    for (const int64_t end = row + rows; row < end; ++row) body(row);
  });
}

// The same for large planes, whose results are stored past the caches. What the system tells of its last
// cache does not help to find the size: some virtual machines call 32 MB 320 MB.
static constexpr int64_t kPastCaches = int64_t{32} << 20;
template <class Body>
static inline void ForStreamedRowPairs(int64_t row_pairs, Body body) {
#pragma omp parallel
  {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < row_pairs; ++row) body(row);
#if defined(__x86_64__)
    _mm_sfence();  // after every row it takes half of the rate away
#endif
  }
}
template <class T>
static inline bool Aligned(const T* p, int64_t row) {
  return (reinterpret_cast<uintptr_t>(p) | row * sizeof(T)) % sizeof(Vf) == 0;
}

// Whether hints for lines that lie in the second-level cache bring more than they cost. Intel's Xeons gain
// from them, AVX2 has no slots to spare, and AMD's processors, which this level is for, are faster without
// (Zen 5, 768p latent, f32: upsampling 4.3 us instead of 5.2, downsampling 4.4 instead of 4.9).
#if PF_LANES == 8 || (defined(__AVX512BF16__) && !defined(__AMX_TILE__))
static constexpr bool kHints = false;
#else
static constexpr bool kHints = true;
#endif

// Asks for the lines that the 2 kLanes values `bytes` ahead of p lie in, to be written (kWrite) or read. They
// come to the first-level cache (kLevel 3) or to the second (2), where far more can be on the way at a time.
template <int kWrite, int kLevel, class T>
static inline void Ahead(const T* p, int64_t bytes) {
  constexpr int kLine = 64 / sizeof(T), kCount = 2 * kLanes < kLine ? 1 : 2 * kLanes / kLine;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) __builtin_prefetch(p + bytes / sizeof(T) + i * kLine, kWrite, kLevel);
}

// y = factor * (2x2 block sums of the rows a and b). kFar: they come from memory.
template <bool kFar, bool kStream, class X, class Y>
static inline void HalveRow(const X* a, const X* b, Y* y, int64_t w, float factor) {
  // Two streams of short rows are more than the hardware foresees: half as fast without the hint, and with
  // one for 4 KB ahead 0.60 of a copy where 16 KB make it 0.84 (64 MB, f32, Zen 4).
  constexpr int kLevel = kFar ? 2 : 3, kAhead = kFar ? 16384 : 2048;
  const auto sums = [=](int64_t j) {
    if constexpr (kFar || kHints) {
      Ahead<0, kLevel>(a + 2 * j, kAhead);
      Ahead<0, kLevel>(b + 2 * j, kAhead);
    }
    return factor * BlockSums(a + 2 * j, b + 2 * j);
  };
  int64_t j = 0;
  if constexpr (kStream)
    for (; j + 2 * kLanes <= w; j += 2 * kLanes) StreamPair(y + j, sums(j), sums(j + kLanes));
  for (; j + 2 * kLanes <= w; j += 2 * kLanes) StorePair(y + j, sums(j), sums(j + kLanes));
  for (; j + kLanes <= w; j += kLanes) StoreF(y + j, sums(j));
  for (; j < w; ++j) {
    const float even = ToFloat(a[2 * j]) + ToFloat(b[2 * j]);
    y[j] = FromFloat<Y>(factor * (even + (ToFloat(a[2 * j + 1]) + ToFloat(b[2 * j + 1]))));
  }
}
// The same of `rows` row pairs in the caches: rows of a latent are a few steps long, and what a row begins
// with would take a fifth of the time. In bf16 a vector is worth two hints with every AVX-512.
template <class X, class Y>
static inline void HalveRows(const X* large, Y* small, int64_t rows, int64_t w, float factor) {
  constexpr bool kShort = sizeof(X) == sizeof(Bf16) && sizeof(Y) == sizeof(Bf16);
  Vf scale = Set1(factor);
  PF_KEEP(scale);  // else every row makes it again, and so below
#if PF_LANES == 8
  Vu upper = Vu{} + 0xffff0000u;
  __m256i parted = PartedHalves(), one = _mm256_set1_epi16(1);
  PF_KEEP(upper);
  PF_KEEP(parted);
  PF_KEEP(one);
#endif
  for (int64_t row = 0; row < rows; ++row, large += 4 * w, small += w) {
    const X *a = large, *b = large + 2 * w;
    const auto sums = [&](int64_t j) {
#if PF_LANES == 8
      if constexpr (sizeof(X) == sizeof(Bf16)) return scale * BlockSums(a + 2 * j, b + 2 * j, upper);
#endif
      if constexpr (kHints || (kShort && PF_LANES == 16)) {
        Ahead<0, 3>(a + 2 * j, 2048);
        Ahead<0, 3>(b + 2 * j, 2048);
      }
      return scale * BlockSums(a + 2 * j, b + 2 * j);
    };
    int64_t j = 0;
    for (; j + 2 * kLanes <= w; j += 2 * kLanes) {
      const Vf low = sums(j), high = sums(j + kLanes);
#if PF_LANES == 8
      if constexpr (kShort) {
        PutVector<false>(small + j, RoundedPair(low, high, parted, one));
        continue;
      }
#endif
      StorePair(small + j, low, high);
    }
    for (; j + kLanes <= w; j += kLanes) StoreF(small + j, sums(j));
    if (j < w) HalveRow<false, false>(a + 2 * j, b + 2 * j, small + j, w - j, factor);
  }
}
template <class X, class Y>
static inline void Halve(const X* large, Y* small, int64_t row_pairs, int64_t w, float factor) {
  const auto row = [=]<bool kFar, bool kStream>(int64_t i) {
    const X* a = large + i * 4 * w;
    HalveRow<kFar, kStream>(a, a + 2 * w, small + i * w, w, factor);
  };
  const int64_t bytes = row_pairs * w * 4 * static_cast<int64_t>(sizeof(X));
  if (bytes >= kPastCaches && Aligned(small, w))
    ForStreamedRowPairs(row_pairs, [=](int64_t i) { row.template operator()<true, true>(i); });
  else if (bytes >= 4 << 20)
    ForRowPairs(row_pairs, w, [=](int64_t i) { row.template operator()<true, false>(i); });
  else
    ForRowGroups(row_pairs, w, [=](int64_t i, int64_t rows) {
      HalveRows(large + i * 4 * w, small + i * w, rows, w, factor);
    });
}

// y[2j] = y[2j + 1] = factor * x[j], j < n. With kHint lines come to be written before they are: the order of
// stores leaves too little time for that.
template <bool kStream, bool kHint, class X, class Y>
static inline void DoublePart(const X* x, Y* y, int64_t n, float factor) {
  const auto ahead = [=](int64_t at) {
    if constexpr (kHint) Ahead<1, 3>(y + at, 512);
  };
  int64_t j = 0;
  if constexpr (sizeof(X) == sizeof(Bf16) && sizeof(Y) == sizeof(Bf16))
    for (; factor == 1 && j + 2 * kLanes <= n; j += 2 * kLanes) {
      ahead(2 * j);
      ahead(2 * j + 2 * kLanes);
      RepeatBits<kStream>(x + j, y + 2 * j);
    }
  for (; j + kLanes <= n; j += kLanes) {
    ahead(2 * j);
    PutTwice<kStream>(y + 2 * j, factor * LoadF(x + j));
  }
  for (; j < n; ++j) y[2 * j] = y[2 * j + 1] = FromFloat<Y>(factor * ToFloat(x[j]));
}
#if PF_LANES == 8
// The same in parts that stay in registers, to the rows y and z: in the caches the stores of AVX2 are what
// takes long. Returns how many values are done.
template <class X, class Y>
static inline int64_t DoubleInParts(const X* x, Y* y, Y* z, int64_t n, float factor) {
  int64_t j = 0;
  if constexpr (sizeof(X) == sizeof(Bf16) && sizeof(Y) == sizeof(Bf16))
    for (; factor == 1 && j + 2 * kLanes <= n; j += 2 * kLanes) {
      RepeatBits(x + j, y + 2 * j);
      RepeatBits(x + j, z + 2 * j);
    }
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    const Vf a = factor * LoadF(x + j), b = factor * LoadF(x + j + kLanes);
    PutTwice(y + 2 * j, a);
    PutTwice(y + 2 * j + 2 * kLanes, b);
    PutTwice(z + 2 * j, a);
    PutTwice(z + 2 * j + 2 * kLanes, b);
  }
  return j;
}
#endif

template <class X, class Y>
static inline void Double(const X* small, Y* large, int64_t row_pairs, int64_t w, float factor) {
  const int64_t bytes = row_pairs * w * 4 * static_cast<int64_t>(sizeof(Y));
  // A cache of 32 MB still takes half of as large a result (Zen 4, bf16: 0.8 of a copy, streamed 0.5).
  if (bytes >= kPastCaches * 3 / 2 && Aligned(large, 2 * w))
    return ForStreamedRowPairs(row_pairs, [=](int64_t row) {
      DoublePart<true, false>(small + row * w, large + row * 4 * w, w, factor);
      DoublePart<true, false>(small + row * w, large + row * 4 * w + 2 * w, w, factor);
    });
  const auto pairs = [=]<bool kHint>() {
    ForRowPairs(row_pairs, w, [=](int64_t row) {
      const X* x = small + row * w;
      Y *y = large + row * 4 * w, *z = y + 2 * w;
      int64_t j = 0;
#if PF_LANES == 8
      if constexpr (!kHint) j = DoubleInParts(x, y, z, w, factor);
#endif
      // One row after the other: written in turns the two are slower.
      DoublePart<false, kHint>(x + j, y + 2 * j, w - j, factor);
      DoublePart<false, kHint>(x + j, z + 2 * j, w - j, factor);
    });
  };
  if (bytes < 4 << 20)
    pairs.template operator()<kHints>();
  else
    pairs.template operator()<true>();
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
