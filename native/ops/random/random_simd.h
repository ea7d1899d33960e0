// philox.h's arithmetic on this level's vectors: one Philox block per lane.
#pragma once
#include "backends/cpu/simd.h"
#include "core/philox.h"

struct VectorLanes {
  typedef Vf F;
  typedef Vu U;
  typedef Vi I;
  static F Mul(F a, F b) { return a * b; }
  static F Add(F a, F b) { return a + b; }
  static F Sub(F a, F b) { return a - b; }
  static F Sqrt(F a) { return ::Sqrt(a); }
  static F FromInt(I a) { return __builtin_convertvector(a, Vf); }
  static U Bits(F a) { return (U)a; }
  static F Float(U a) { return (F)a; }
  static F Splat(float a) { return Set1(a); }
  // The 32 x 32 -> 64 multiply takes even lanes only: odd lanes are shifted down, multiplied and put back.
  static void MulWide(U a, uint32_t m, U* high, U* low) {
#if PF_LANES == 16
    const __m512i v = (__m512i)a, k = _mm512_set1_epi64(m);
    const __m512i even = _mm512_maskz_mul_epu32(-1, v, k);
    const __m512i odd = _mm512_maskz_mul_epu32(-1, _mm512_maskz_srli_epi64(-1, v, 32), k);
    *high = (U)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(-1, even, 32), odd);
    *low = (U)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(-1, odd, 32));
#elif PF_LANES == 8
    const __m256i v = (__m256i)a, k = _mm256_set1_epi64x(m);
    const __m256i even = _mm256_mul_epu32(v, k), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), k);
    *high = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    *low = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#elif defined(__aarch64__)
    const uint32x4_t v = (uint32x4_t)a;
    const uint64x2_t first = vmull_n_u32(vget_low_u32(v), m), second = vmull_high_n_u32(v, m);
    *high = (U)vuzp2q_u32((uint32x4_t)first, (uint32x4_t)second);
    *low = (U)vuzp1q_u32((uint32x4_t)first, (uint32x4_t)second);
#else
    const __m128i v = (__m128i)a, k = _mm_set1_epi64x(m), upper = _mm_set1_epi64x(0xffffffff00000000);
    const __m128i even = _mm_mul_epu32(v, k), odd = _mm_mul_epu32(_mm_srli_epi64(v, 32), k);
    *high = (U)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_and_si128(odd, upper));
    *low = (U)_mm_or_si128(_mm_andnot_si128(upper, even), _mm_slli_epi64(odd, 32));
#endif
  }
};

// Each group of four lanes of v[0..3] is transposed.
#if defined(__aarch64__)
static inline void TransposeFours(Vf* v) {
  const Vi low = {0, 4, 1, 5}, first = {0, 1, 4, 5};
  const Vf a = __builtin_shuffle(v[0], v[1], low), b = __builtin_shuffle(v[2], v[3], low);
  const Vf c = __builtin_shuffle(v[0], v[1], low + 2), d = __builtin_shuffle(v[2], v[3], low + 2);
  v[0] = __builtin_shuffle(a, b, first);
  v[1] = __builtin_shuffle(a, b, first + 2);
  v[2] = __builtin_shuffle(c, d, first);
  v[3] = __builtin_shuffle(c, d, first + 2);
}
#else
static inline void TransposeFours(Vf* v) {
#if PF_LANES == 16
  // The masked forms, all lanes on: GCC 12 warns about the undefined operand inside the plain ones.
#define PF_MM(op, type, a, b) (Vf) _mm512_maskz_##op(-1, (type)(a), (type)(b))
  typedef __m512 S;
  typedef __m512d D;
#elif PF_LANES == 8
#define PF_MM(op, type, a, b) (Vf) _mm256_##op((type)(a), (type)(b))
  typedef __m256 S;
  typedef __m256d D;
#else
#define PF_MM(op, type, a, b) (Vf) _mm_##op((type)(a), (type)(b))
  typedef __m128 S;
  typedef __m128d D;
#endif
  const Vf a = PF_MM(unpacklo_ps, S, v[0], v[1]), b = PF_MM(unpacklo_ps, S, v[2], v[3]);
  const Vf c = PF_MM(unpackhi_ps, S, v[0], v[1]), d = PF_MM(unpackhi_ps, S, v[2], v[3]);
  v[0] = PF_MM(unpacklo_pd, D, a, b);
  v[1] = PF_MM(unpackhi_pd, D, a, b);
  v[2] = PF_MM(unpacklo_pd, D, c, d);
  v[3] = PF_MM(unpackhi_pd, D, c, d);
#undef PF_MM
}
#endif

static constexpr int64_t kGroup = 4 * kLanes;  // numbers from one pass of all lanes

struct NormalNumbers {
  static void Convert(const Vu* c, Vf* v) {
    NormalPair<VectorLanes>(c[0], c[1], v, v + 1);
    NormalPair<VectorLanes>(c[2], c[3], v + 2, v + 3);
  }
};
struct UniformNumbers {
  static void Convert(const Vu* c, Vf* v) {
    for (int i = 0; i < 4; ++i) v[i] = UnitUniform<VectorLanes>(c[i]);
  }
};

// Blocks first .. first + kLanes - 1. Lane 4l + r takes block r * kLanes / 4 + l: after the transpose inside
// groups of four, register r then holds its blocks in order and is stored as it is.
template <class Numbers>
static inline void RandomGroup(const PhiloxKey& key, uint64_t first, float* out) {
  Vu lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i % 4 * (kLanes / 4) + i / 4;
  const Vu low = lane + static_cast<uint32_t>(first);
  const Vu carry = (Vu)(low < lane);
  Vu c[4] = {low, static_cast<uint32_t>(first >> 32) - carry, key.stream_lo - (Vu){}, key.stream_hi - (Vu){}};
  PhiloxRounds<VectorLanes>(c, key.seed_lo, key.seed_hi);
  Vf v[4];
  Numbers::Convert(c, v);
  TransposeFours(v);
  for (int r = 0; r < 4; ++r) StoreF(out + r * kLanes, v[r]);
}

// Elements start .. start + n - 1 of the stream.
template <class Numbers>
static inline void FillRandom(const PhiloxKey& key, uint64_t start, int64_t n, float* out) {
  while (n > 0) {
    const int64_t skip = start % 4;
    if (skip == 0 && n >= kGroup) {
      RandomGroup<Numbers>(key, start / 4, out);
      start += kGroup, out += kGroup, n -= kGroup;
      continue;
    }
    alignas(64) float group[kGroup];
    RandomGroup<Numbers>(key, start / 4, group);
    const int64_t take = n < kGroup - skip ? n : kGroup - skip;
    memcpy(out, group + skip, take * sizeof(float));
    start += take, out += take, n -= take;
  }
}
