// One vector type per instruction level, spelled once: kernels are written against Vf and compiled for each
// level. No STL here: an inline function compiled for AVX-512 must never become the copy an older CPU runs.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/check.h"
#include "core/half.h"
#include "core/op.h"

#if defined(__AVX512F__)
#define PF_LANES 16
#elif defined(__AVX2__)
#define PF_LANES 8
#else
#define PF_LANES 4
#endif

static constexpr int kLanes = PF_LANES;
typedef float Vf __attribute__((vector_size(PF_LANES * 4)));
typedef int32_t Vi __attribute__((vector_size(PF_LANES * 4)));
typedef uint32_t Vu __attribute__((vector_size(PF_LANES * 4)));
typedef uint16_t Vh __attribute__((vector_size(PF_LANES * 2)));

static inline Vf Set1(float x) { return x - (Vf){}; }
static inline Vf LoadF(const float* p) {
  Vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
static inline Vf LoadF(const Bf16* p) {
  Vh h;
  memcpy(&h, p, sizeof(h));
  return (Vf)(__builtin_convertvector(h, Vu) << 16);
}
static inline void StoreF(float* p, Vf v) { memcpy(p, &v, sizeof(v)); }
// v rounded to bf16, in the lower half of every lane.
static inline Vu Bf16Bits(Vf v) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zero; nothing here lives below 1e-38.
  return __builtin_convertvector((Vh)_mm512_cvtneps_pbh((__m512)v), Vu);
#else
  const Vu u = (Vu)v;
  const Vu rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  const Vu nan = (Vu)((u & 0x7fffffffu) > 0x7f800000u);
  return (rounded & ~nan) | (((u >> 16) | 0x40) & nan);
#endif
}
static inline void StoreF(Bf16* p, Vf v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const Vh h = __builtin_convertvector(Bf16Bits(v), Vh);
#endif
  memcpy(p, &h, sizeof(h));
}

// Results larger than this leave the caches before anybody reads them: written past the caches they need not
// be read first. That takes vectors at aligned addresses.
static constexpr int64_t kStreamBytes = 16 << 20;
static inline bool WorthStreaming(const void* y, int64_t bytes, int64_t row_bytes) {
  return bytes >= kStreamBytes && reinterpret_cast<uintptr_t>(y) % sizeof(Vf) == 0 &&
         row_bytes % sizeof(Vf) == 0;
}
// A whole vector, past the caches if asked; whoever streams ends with _mm_sfence.
template <bool kStream>
static inline void Put(void* p, Vf v) {
  if constexpr (!kStream)
    memcpy(p, &v, sizeof(v));
  else
#if defined(__AVX512F__)
    _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#else
    _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#endif
}
// The last, incomplete vector of a row: missing lanes read as fill and are not written.
template <class T>
static inline Vf LoadN(const T* p, int64_t n, float fill = 0) {
  if (n >= kLanes) return LoadF(p);
  Vf v = Set1(fill);
  for (int i = 0; i < n; ++i) v[i] = ToFloat(p[i]);
  return v;
}
template <class T>
static inline void StoreN(T* p, Vf v, int64_t n) {
  if (n >= kLanes) return StoreF(p, v);
  for (int i = 0; i < n; ++i) p[i] = FromFloat<T>(v[i]);
}

// a * b + c, in one rounding where the level has FMA. Never use it where levels must agree bit by bit.
static inline Vf Fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
// The larger and the smaller; b where either is NaN. The compiler does not find the instruction by itself.
#if defined(__AVX512F__)
static inline Vf Max(Vf a, Vf b) { return (Vf)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b); }
static inline Vf Min(Vf a, Vf b) { return (Vf)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline Vf Max(Vf a, Vf b) { return (Vf)_mm256_max_ps((__m256)a, (__m256)b); }
static inline Vf Min(Vf a, Vf b) { return (Vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline Vf Max(Vf a, Vf b) { return (Vf)_mm_max_ps((__m128)a, (__m128)b); }
static inline Vf Min(Vf a, Vf b) { return (Vf)_mm_min_ps((__m128)a, (__m128)b); }
#endif
// Whether any lane of a comparison's result holds.
static inline bool AnyLane(Vi v) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)v) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)v) != 0;
#else
  return _mm_movemask_ps((__m128)v) != 0;
#endif
}
static inline Vf Sqrt(Vf x) {
#if defined(__AVX512F__)
  // GCC 12 warns of an uninitialised operand inside the unmasked form.
  return (Vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Vf)_mm256_sqrt_ps((__m256)x);
#else
  return (Vf)_mm_sqrt_ps((__m128)x);
#endif
}
// Lanes are added pairwise in a fixed order, so the result does not depend on the compiler.
static inline float Sum(Vf v) {
  float t[kLanes];
  StoreF(t, v);
  for (int w = kLanes / 2; w; w /= 2)
    for (int i = 0; i < w; ++i) t[i] += t[i + w];
  return t[0];
}
static inline float MaxLane(Vf v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x by range reduction to [-ln2/2, ln2/2] and a degree-6 polynomial; relative error below 2e-7, 0 below
// -87.3, infinity above 88.7.
static inline Vf Exp(Vf x) {
  const Vf lo = Set1(-87.33654f), hi = Set1(88.72283f);
  const Vf clamped = Min(Max(x, lo), hi);
  const Vf magic = Set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vf k = Fma(clamped, Set1(1.44269504f), magic) - magic;
  Vf r = Fma(k, Set1(-0.693359375f), clamped);
  r = Fma(k, Set1(2.12194440e-4f), r);
  Vf p = Set1(1.9875691500e-4f);
  p = Fma(p, r, Set1(1.3981999507e-3f));
  p = Fma(p, r, Set1(8.3334519073e-3f));
  p = Fma(p, r, Set1(4.1665795894e-2f));
  p = Fma(p, r, Set1(1.6666665459e-1f));
  p = Fma(p, r, Set1(5.0000001201e-1f));
  p = Fma(p * r, r, r + 1.0f);
  // 2^k in two factors: k = 128 would overflow the exponent field of one.
  const Vi ki = __builtin_convertvector(k, Vi);
  const Vi half = ki >> 1;
  p = p * (Vf)((half + 127) << 23) * (Vf)((ki - half + 127) << 23);
  p = x < lo ? (Vf){} : p;
  p = x > hi ? Set1(INFINITY) : p;
  return x != x ? x : p;
}
static inline Vf Sigmoid(Vf x) { return 1.0f / (1.0f + Exp(-x)); }
static inline Vf Tanh(Vf x) { return 1.0f - 2.0f / (1.0f + Exp(x + x)); }
static inline Vf Silu(Vf x) { return x * Sigmoid(x); }
// GELU, tanh form: 0.5 x (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
static inline Vf GeluTanh(Vf x) { return x * Sigmoid(1.5957691216f * Fma(x * x * x, Set1(0.044715f), x)); }

// Runs body<T>() with T chosen by a float view's dtype; for kernels that are templates over storage.
#define PF_FLOAT_DISPATCH(view, T, ...) \
  do {                                  \
    if ((view).dtype == PF_BF16) {      \
      using T = Bf16;                   \
      __VA_ARGS__                       \
    } else {                            \
      using T = float;                  \
      __VA_ARGS__                       \
    }                                   \
  } while (0)
