// Rows in f32: kernels that are bound by memory read any float storage through here and are written once.
#pragma once
#include <omp.h>

#include "backends/cpu/simd.h"

// Below this many elements a parallel region costs more than it saves.
static constexpr int64_t kParallelWork = 1 << 14;

template <class T>
static inline T* Scratch(const PfArgs* a, int64_t count) {
  return static_cast<T*>(a->context->scratch(a->context, (count > 0 ? count : 1) * sizeof(T)));
}
static inline int32_t NoMemory(const PfArgs* a, const char* op) {
  return Fail(a, PF_ERR_MEMORY, "%s: no scratch memory left", op);
}

// Calls f(i, lanes) for whole vectors, then once for what remains.
template <class F>
static inline void ForLanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, int64_t{kLanes});
  if (i < n) f(i, n - i);
}

// Sum of term(i, lanes) over a row; four partial sums hide the latency of the additions.
template <class F>
static inline float RowSum(int64_t n, F term) {
  Vf s[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) s[u] += term(i + u * kLanes, int64_t{kLanes});
  for (; i + kLanes <= n; i += kLanes) s[0] += term(i, int64_t{kLanes});
  if (i < n) s[1] += term(i, n - i);
  return Sum((s[0] + s[1]) + (s[2] + s[3]));
}

// y[i] = value(i, lanes) for a row, two vectors at a time.
template <class T, class F>
static inline void WriteRow(T* y, int64_t n, F value) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    StorePair(y + i, value(i, int64_t{kLanes}), value(i + kLanes, int64_t{kLanes}));
  for (; i < n; i += kLanes) {
    const int64_t m = n - i < kLanes ? n - i : kLanes;
    StoreN(y + i, value(i, m), m);
  }
}

template <class T>
static inline float SquareSum(const T* x, int64_t n) {
  return RowSum(n, [=](int64_t i, int64_t m) {
    const Vf v = LoadN(x + i, m);
    return v * v;
  });
}
// sums[i] = sum of the squares of row i of `rows`, n values each.
template <class T>
static inline void SquareSums(const T* x, int64_t rows, int64_t n, float* sums) {
  for (int64_t i = 0; i < rows; ++i) sums[i] = SquareSum(x + i * n, n);
}
struct Moments {
  float mean, variance;
};
// Centred before squaring: a row far from zero keeps its digits. Missing lanes read as the mean.
template <class T>
static inline Moments ExactMoments(const T* x, int64_t n) {
  const float mean = RowSum(n, [=](int64_t i, int64_t m) { return LoadN(x + i, m); }) / n;
  const float squares = RowSum(n, [=](int64_t i, int64_t m) {
    const Vf c = LoadN(x + i, m, mean) - mean;
    return c * c;
  });
  return {mean, squares / n};
}
template <class T>
static inline Moments MomentsOf(const T* x, int64_t n) {
  return ExactMoments(x, n);
}

#if defined(__AVX512BF16__)
static constexpr int kPairs = 2 * kLanes;
// Whether E[x²] - E[x]² kept digits enough for a result in bf16: at most ten of 24 bits cancelled.
static inline bool FewCancelled(float mean, float variance) { return variance > 1e-3f * mean * mean; }
static inline Vf DotPairs(Vf sum, __m512bh a, __m512bh b) { return (Vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
static inline __m512bh LoadPairs(const Bf16* p) {
  __m512bh v;
  memcpy(&v, p, sizeof(v));
  return v;
}
static inline __m512bh OnePairs() { return (__m512bh)_mm512_set1_epi16(0x3f80); }

// The dot product of pairs adds and squares 32 values in an instruction each; products of bf16 are exact in
// f32.
static inline float SquareSum(const Bf16* x, int64_t n) {
  Vf a = {}, b = {};
  int64_t i = 0;
  for (; i + 2 * kPairs <= n; i += 2 * kPairs) {
    const __m512bh u = LoadPairs(x + i), v = LoadPairs(x + i + kPairs);
    a = DotPairs(a, u, u);
    b = DotPairs(b, v, v);
  }
  for (; i < n; i += kLanes) {
    const Vf v = LoadN(x + i, n - i);
    a += v * v;
  }
  return Sum(a + b);
}
// Sixteen rows of whole vectors at a time are added up by few more shuffles than one row takes alone.
static inline void SquareSums(const Bf16* x, int64_t rows, int64_t n, float* sums) {
  if (n % kPairs) return SquareSums<Bf16>(x, rows, n, sums);
  for (int64_t first = 0; first < rows; first += 16) {
    Vf v[16] = {};
    const int64_t count = rows - first < 16 ? rows - first : 16;
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i)
      for (int64_t j = 0; i < count && j < n; j += kPairs) {
        const __m512bh pairs = LoadPairs(x + (first + i) * n + j);
        v[i] = DotPairs(v[i], pairs, pairs);
      }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
      v[i] = (Vf)(_mm512_maskz_unpacklo_ps(0xffff, a, b) + _mm512_maskz_unpackhi_ps(0xffff, a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = (__m512d)v[2 * i], b = (__m512d)v[2 * i + 1];
      v[i] = (Vf)_mm512_maskz_unpacklo_pd(0xff, a, b) + (Vf)_mm512_maskz_unpackhi_pd(0xff, a, b);
    }
#pragma GCC unroll 2
    for (int levels = 2; levels > 0; --levels)
#pragma GCC unroll 2
      for (int i = 0; i < levels; ++i) {
        const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
        v[i] = (Vf)(_mm512_maskz_shuffle_f32x4(0xffff, a, b, 0x88) +
                    _mm512_maskz_shuffle_f32x4(0xffff, a, b, 0xdd));
      }
    StoreN(sums + first, v[0], count);
  }
}
static inline Moments MomentsOf(const Bf16* x, int64_t n) {
  // Eight sums: a dot product takes six cycles, and two begin in each.
  constexpr int kSums = 4;
  Vf sum[kSums] = {}, square[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kPairs <= n; i += kSums * kPairs)
    for (int k = 0; k < kSums; ++k) {
      const __m512bh v = LoadPairs(x + i + k * kPairs);
      sum[k] = DotPairs(sum[k], v, OnePairs());
      square[k] = DotPairs(square[k], v, v);
    }
  for (; i < n; i += kLanes) {
    const Vf v = LoadN(x + i, n - i);
    sum[0] += v;
    square[0] += v * v;
  }
  const float mean = Sum((sum[0] + sum[1]) + (sum[2] + sum[3])) / n;
  const float variance = Sum((square[0] + square[1]) + (square[2] + square[3])) / n - mean * mean;
  return FewCancelled(mean, variance) ? Moments{mean, variance} : ExactMoments(x, n);
}
#endif

// n values from element offset on: the memory itself when it is f32, otherwise converted into buffer.
static inline const float* ReadRow(const PfView& v, int64_t offset, int64_t n, float* buffer) {
  if (v.dtype == PF_F32) return PfData<float>(v) + offset;
  const Bf16* p = PfData<Bf16>(v) + offset;
  ForLanes(n, [&](int64_t i, int64_t m) { StoreN(buffer + i, LoadN(p + i, m), m); });
  return buffer;
}
// Where to write a row; CommitRow afterwards converts it when it was written into buffer.
static inline float* OpenRow(const PfView& v, int64_t offset, float* buffer) {
  return v.dtype == PF_F32 ? PfData<float>(v) + offset : buffer;
}
static inline void CommitRow(const PfView& v, int64_t offset, int64_t n, const float* row) {
  if (v.dtype == PF_F32) return;
  Bf16* p = PfData<Bf16>(v) + offset;
  ForLanes(n, [&](int64_t i, int64_t m) { StoreN(p + i, LoadN(row + i, m), m); });
}

// A small operand in f32 as a whole; *out is nullptr when it is absent. False when scratch runs out.
static inline bool AsFloats(const PfArgs* a, const PfView& v, const float** out) {
  *out = nullptr;
  if (!PfPresent(v)) return true;
  float* buffer = v.dtype == PF_F32 ? nullptr : Scratch<float>(a, PfCount(v));
  if (v.dtype != PF_F32 && !buffer) return false;
  *out = ReadRow(v, 0, PfCount(v), buffer);
  return true;
}
