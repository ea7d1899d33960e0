// One vector type per instruction level, spelled once: kernels are written against Vf and compiled for each
// level. No STL here: an inline function compiled for AVX-512 must never become the copy an older CPU runs.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif
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

static inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline Vf Set1(float x) { return x - (Vf){}; }
static inline Vf LoadF(const float* p) {
  Vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
// Every 16-bit value in the lower half of a lane. GCC 12 makes five instructions of the conversion that is
// one.
static inline Vu Widen(Vh h) {
#if defined(__AVX512F__)
  return (Vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif defined(__AVX2__)
  return (Vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Vu);
#endif
}
static inline Vf LoadF(const Bf16* p) {
  Vh h;
  memcpy(&h, p, sizeof(h));
  return (Vf)(Widen(h) << 16);
}
static inline void StoreF(float* p, Vf v) { memcpy(p, &v, sizeof(v)); }
// v rounded to bf16, in the lower half of every lane.
static inline Vu Bf16Bits(Vf v) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zero; nothing here lives below 1e-38.
  return Widen((Vh)_mm512_cvtneps_pbh((__m512)v));
#else
  const Vu u = (Vu)v;
  return (v != v ? u | 0x400000 : u + 0x7fffu + ((u >> 16) & 1)) >> 16;
#endif
}
#if defined(__AVX512BF16__)
// Two vectors of 16 bits each, one after the other, by turns.
static inline __m512i ByTurns(__m512i v) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), v);
}
#endif
// Pairs of bf16, `low` in the lower halves.
static inline Vu Bf16Pairs(Vf low, Vf high) {
#if defined(__AVX512BF16__)
  return (Vu)ByTurns((__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return Bf16Bits(low) | Bf16Bits(high) << 16;
#endif
}
static inline Vh Narrow(Vu u) {
#if defined(__AVX512F__)
  return (Vh)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_packus_epi32((__m256i)u, (__m256i)u);  // each 128-bit half packs its own
  return (Vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(lanes, 0x08));
#else
  return __builtin_convertvector(u, Vh);
#endif
}
static inline void StoreF(Bf16* p, Vf v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const Vh h = Narrow(Bf16Bits(v));
#endif
  memcpy(p, &h, sizeof(h));
}

// Two vectors of neighbours: one rounding and one store where the level has them.
static inline void StorePair(float* p, Vf a, Vf b) {
  StoreF(p, a);
  StoreF(p + kLanes, b);
}
#if PF_LANES == 8
// The lower halves of four values, then the upper ones: as _mm256_shuffle_epi8 wants it.
static inline __m256i PartedHalves() {
  return _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
}
// a and b rounded to bf16, both halves of 16 values at once; `one` in every 16 bits. Not for NaN, unless of
// bf16: with an empty lower half there is nothing to carry.
static inline Vf RoundedPair(Vf a, Vf b, __m256i parted, __m256i one) {
  const __m256i x = _mm256_shuffle_epi8((__m256i)a, parted), y = _mm256_shuffle_epi8((__m256i)b, parted);
  const __m256i low = _mm256_unpacklo_epi64(x, y), high = _mm256_unpackhi_epi64(x, y);
  // One up if the lower half is a half or more, less one where the upper one is even.
  const __m256i less = _mm256_subs_epu16(low, _mm256_andnot_si256(high, one));
  const __m256i rounded = _mm256_add_epi16(high, _mm256_srli_epi16(less, 15));
  return (Vf)_mm256_permute4x64_epi64(rounded, 0xd8);  // each 128-bit half packed its own
}
#endif
// Both rounded to bf16, a first.
static inline Vf Bf16Packed(Vf a, Vf b) {
#if defined(__AVX512BF16__)
  return (Vf)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
#elif PF_LANES == 16
  const __m256i low = (__m256i)Narrow(Bf16Bits(a)), high = (__m256i)Narrow(Bf16Bits(b));
  return (Vf)_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(low), high, 1);
#elif PF_LANES == 8
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)), 0)) {
    const __m256i halves = _mm256_packus_epi32((__m256i)Bf16Bits(a), (__m256i)Bf16Bits(b));
    return (Vf)_mm256_permute4x64_epi64(halves, 0xd8);
  }
  return RoundedPair(a, b, PartedHalves(), _mm256_set1_epi16(1));
#else
  return (Vf)(uint64_t __attribute__((vector_size(16)))){(uint64_t)Narrow(Bf16Bits(a)),
                                                         (uint64_t)Narrow(Bf16Bits(b))};
#endif
}
static inline void StorePair(Bf16* p, Vf a, Vf b) {
  const Vf v = Bf16Packed(a, b);
  memcpy(p, &v, sizeof(v));
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
#elif defined(__aarch64__)
  return (Vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
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
#elif defined(__x86_64__)
static inline Vf Max(Vf a, Vf b) { return (Vf)_mm_max_ps((__m128)a, (__m128)b); }
static inline Vf Min(Vf a, Vf b) { return (Vf)_mm_min_ps((__m128)a, (__m128)b); }
#else
static inline Vf Max(Vf a, Vf b) { return a > b ? a : b; }
static inline Vf Min(Vf a, Vf b) { return a < b ? a : b; }
#endif
// Whether any lane of a comparison's result holds.
static inline bool AnyLane(Vi v) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)v) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)v) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)v) != 0;
#else
  return vmaxvq_u32((uint32x4_t)v) != 0;
#endif
}
static inline Vf Sqrt(Vf x) {
#if defined(__AVX512F__)
  // GCC 12 warns of an uninitialised operand inside the unmasked form.
  return (Vf)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (Vf)_mm_sqrt_ps((__m128)x);
#else
  return (Vf)vsqrtq_f32((float32x4_t)x);
#endif
}
#if PF_LANES == 16
static constexpr Vi kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static constexpr Vf kAlternate = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
#elif PF_LANES == 8
static constexpr Vi kLaneIndex = {0, 1, 2, 3, 4, 5, 6, 7};
static constexpr Vf kAlternate = {-1, 1, -1, 1, -1, 1, -1, 1};
#else
static constexpr Vi kLaneIndex = {0, 1, 2, 3};
static constexpr Vf kAlternate = {-1, 1, -1, 1};
#endif
// Forbids the compiler to compute v a second time instead of keeping it.
#if defined(__x86_64__)
#define PF_VECTOR_REGISTER "v"
#else
#define PF_VECTOR_REGISTER "w"
#endif
#define PF_KEEP(v) asm("" : "+" PF_VECTOR_REGISTER(v))

// Neighbours change places.
static inline Vf SwapPairs(Vf v) { return __builtin_shuffle(v, kLaneIndex ^ 1); }
// v0 v0 v1 v1 .. of the lower or the upper half of v.
#if PF_LANES == 8
// One crossing of the 128-bit halves serves both; the compiler finds two slower ones.
static inline __m256 Crossed(Vf v) { return (__m256)_mm256_permute4x64_pd((__m256d)v, 0xd8); }
static inline Vf TwiceLow(Vf v) { return (Vf)_mm256_unpacklo_ps(Crossed(v), Crossed(v)); }
static inline Vf TwiceHigh(Vf v) { return (Vf)_mm256_unpackhi_ps(Crossed(v), Crossed(v)); }
#else
static inline Vf TwiceLow(Vf v) { return __builtin_shuffle(v, kLaneIndex >> 1); }
static inline Vf TwiceHigh(Vf v) { return __builtin_shuffle(v, (kLaneIndex >> 1) + kLanes / 2); }
#endif
// Lanes are added pairwise in a fixed order, so the result does not depend on the compiler.
static inline float Sum(Vf v) {
#pragma GCC unroll 4
  for (int w = kLanes / 2; w; w /= 2) v += __builtin_shuffle(v, (kLaneIndex + w) & (kLanes - 1));
  return v[0];
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
// 2^x for x below 127, practically 0 below -125; NaN stays. Polynomials of least relative error: below 1e-7,
// or below 8e-5 if kCoarse.
#if defined(__AVX512F__)
// One instruction takes the fraction, one scales by the whole part, and -infinity needs no care.
template <bool kCoarse>
static inline Vf Exp2(Vf x) {
  constexpr int kFloor = 1;
  const Vf f = (Vf)_mm512_maskz_reduce_ps(0xffff, (__m512)x, kFloor);
  Vf p;
  if constexpr (kCoarse) {
    p = Fma(Set1(7.802451966e-2f), f, Set1(2.260671597e-1f));
    p = Fma(p, f, Set1(6.958335390e-1f));
    p = Fma(p, f, Set1(9.999252186e-1f));
  } else {
    p = Fma(Set1(1.877569049e-3f), f, Set1(8.989358501e-3f));
    p = Fma(p, f, Set1(5.582630266e-2f));
    p = Fma(p, f, Set1(2.401536222e-1f));
    p = Fma(p, f, Set1(6.931530726e-1f));
    p = Fma(p, f, Set1(9.999999251e-1f));
  }
  return (Vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)x);
}
#else
template <bool kCoarse>
static inline Vf Exp2(Vf x) {
  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold.
  const Vf magic = Set1(12582912.0f);
  x = Max(Set1(-125.0f), x);
  const Vf shifted = x + magic;
  const Vf f = x - (shifted - magic);
  Vf p;
  if constexpr (kCoarse) {
    p = Fma(Set1(5.517166695e-2f), f, Set1(2.426111220e-1f));
    p = Fma(p, f, Set1(6.932609859e-1f));
    p = Fma(p, f, Set1(9.999280736e-1f));
  } else {
    p = Fma(Set1(1.327640379e-3f), f, Set1(9.675540790e-3f));
    p = Fma(p, f, Set1(5.550713484e-2f));
    p = Fma(p, f, Set1(2.402211974e-1f));
    p = Fma(p, f, Set1(6.931469669e-1f));
    p = Fma(p, f, Set1(1.000000072f));
  }
  return (Vf)((Vi)p + ((Vi)shifted << 23));
}
#endif
// 1 / x for finite x of at least 2^-126; relative error below 2e-7, or below 7e-5 if kCoarse.
template <bool kCoarse = false>
static inline Vf Reciprocal(Vf x) {
#if defined(__AVX512F__)
  const Vf r = (Vf)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return kCoarse ? r : r * Fma(-x, r, Set1(2.0f));
#else
  return 1.0f / x;
#endif
}
// kCoarse is for results that are rounded to bf16 (4e-3): below 2e-4.
template <bool kCoarse = false>
static inline Vf Sigmoid(Vf x) {
  Vf t = x * -1.44269504f;
#if defined(__AVX512F__)
  // Without Newton's step infinity has the reciprocal 0.
  if (!kCoarse)
#endif
    t = Min(Set1(126.0f), t);
  return Reciprocal<kCoarse>(1.0f + Exp2<kCoarse>(t));
}
static inline Vf Tanh(Vf x) { return 1.0f - 2.0f / (1.0f + Exp(x + x)); }
template <bool kCoarse = false>
static inline Vf Silu(Vf x) {
  return x * Sigmoid<kCoarse>(x);
}
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
