// Counter-based random numbers: Philox4x32-10 and Box-Muller normals, the same bits on every level and
// device. Only integer operations and IEEE + - * sqrt are used, never fused and never from a maths library:
// each of those rounds the same way everywhere. The arithmetic is written once over a lane type; ScalarLanes
// serves the reference, CUDA and tests, ops/random/random_simd.h gives the CPU's vectors.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/half.h"  // PF_HD

struct ScalarLanes {
  typedef float F;
  typedef uint32_t U;
  typedef int32_t I;
  // nvcc would contract a * b + c into one rounding; it never merges the _rn intrinsics.
#if defined(__CUDA_ARCH__)
#define PF_DEVICE_OR_HOST(device, host) device
#else
#define PF_DEVICE_OR_HOST(device, host) host
#endif
  PF_HD static F Mul(F a, F b) { return PF_DEVICE_OR_HOST(__fmul_rn(a, b), a * b); }
  PF_HD static F Add(F a, F b) { return PF_DEVICE_OR_HOST(__fadd_rn(a, b), a + b); }
  PF_HD static F Sub(F a, F b) { return PF_DEVICE_OR_HOST(__fadd_rn(a, -b), a - b); }
  PF_HD static F Sqrt(F a) { return PF_DEVICE_OR_HOST(__fsqrt_rn(a), sqrtf(a)); }
  PF_HD static F FromInt(I a) { return PF_DEVICE_OR_HOST(__int2float_rn(a), static_cast<float>(a)); }
#undef PF_DEVICE_OR_HOST
  PF_HD static U Bits(F a) {
    U u;
    memcpy(&u, &a, 4);
    return u;
  }
  PF_HD static F Float(U a) {
    F f;
    memcpy(&f, &a, 4);
    return f;
  }
  PF_HD static F Splat(float a) { return a; }
  PF_HD static void MulWide(U a, uint32_t m, U* high, U* low) {
    const uint64_t product = static_cast<uint64_t>(a) * m;
    *high = static_cast<U>(product >> 32);
    *low = static_cast<U>(product);
  }
};

// What names one stream of numbers: the seed is the key, the stream is the upper half of the counter.
struct PhiloxKey {
  uint32_t seed_lo, seed_hi, stream_lo, stream_hi;
};

// Ten rounds in place: counter c = (block lo, block hi, stream lo, stream hi) becomes four random words.
template <class L>
PF_HD static inline void PhiloxRounds(typename L::U* c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    typename L::U high0, low0, high1, low1;
    L::MulWide(c[0], 0xD2511F53u, &high0, &low0);
    L::MulWide(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// sqrt(-2 ln u) of a random word, u in (0, 1]: 31 bits and half a step, so the largest value is 6.66.
template <class L>
PF_HD static inline typename L::F NormalRadius(typename L::U word) {
  typedef typename L::F F;
  typedef typename L::U U;
  typedef typename L::I I;
  const F u = L::Add(L::Mul(L::FromInt((I)(word >> 1)), L::Splat(0x1p-31f)), L::Splat(0x1p-32f));
  // u = 2^e * m with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) moves the split there.
  const U shifted = L::Bits(u) - 0x3f3504f3u;
  const F e = L::FromInt((I)shifted >> 23);
  const F x = L::Sub(L::Float((shifted & 0x007fffffu) + 0x3f3504f3u), L::Splat(1.0f));
  const F z = L::Mul(x, x);
  F p = L::Splat(7.0376836292e-2f);
  p = L::Add(L::Mul(p, x), L::Splat(-1.1514610310e-1f));
  p = L::Add(L::Mul(p, x), L::Splat(1.1676998740e-1f));
  p = L::Add(L::Mul(p, x), L::Splat(-1.2420140846e-1f));
  p = L::Add(L::Mul(p, x), L::Splat(1.4249322787e-1f));
  p = L::Add(L::Mul(p, x), L::Splat(-1.6668057665e-1f));
  p = L::Add(L::Mul(p, x), L::Splat(2.0000714765e-1f));
  p = L::Add(L::Mul(p, x), L::Splat(-2.4999993993e-1f));
  p = L::Add(L::Mul(p, x), L::Splat(3.3333331174e-1f));
  p = L::Mul(L::Mul(p, x), z);
  p = L::Add(p, L::Mul(e, L::Splat(-2.12194440e-4f)));
  p = L::Sub(p, L::Mul(z, L::Splat(0.5f)));
  const F log = L::Add(L::Add(x, p), L::Mul(e, L::Splat(0.693359375f)));
  return L::Sqrt(L::Mul(log, L::Splat(-2.0f)));
}

// Box-Muller: two words give two independent normals. The angle 2 pi word / 2^32 is reduced in integers: the
// two top bits (rounded) are the quadrant, the signed rest is an angle in [-pi/4, pi/4].
template <class L>
PF_HD static inline void NormalPair(typename L::U word0, typename L::U word1, typename L::F* z0,
                                    typename L::F* z1) {
  typedef typename L::F F;
  typedef typename L::U U;
  typedef typename L::I I;
  const F radius = NormalRadius<L>(word0);
  const U quadrant = (word1 + 0x20000000u) >> 30;
  const F r = L::Mul(L::FromInt((I)(word1 - (quadrant << 30))), L::Splat(1.46291807926715968e-9f));
  const F z = L::Mul(r, r);
  F s = L::Splat(-1.9515295891e-4f);
  s = L::Add(L::Mul(s, z), L::Splat(8.3321608736e-3f));
  s = L::Add(L::Mul(s, z), L::Splat(-1.6666654611e-1f));
  s = L::Add(L::Mul(L::Mul(s, z), r), r);
  F c = L::Splat(2.443315711809948e-5f);
  c = L::Add(L::Mul(c, z), L::Splat(-1.388731625493765e-3f));
  c = L::Add(L::Mul(c, z), L::Splat(4.166664568298827e-2f));
  c = L::Mul(L::Mul(c, z), z);
  c = L::Add(L::Sub(c, L::Mul(z, L::Splat(0.5f))), L::Splat(1.0f));
  // Odd quadrants exchange sine and cosine; the signs are flipped in the bits.
  const U odd = (quadrant & 1) * 0xffffffffu;
  const U sine = L::Bits(s), cosine = L::Bits(c);
  const U cos_bits = ((cosine & ~odd) | (sine & odd)) ^ (((quadrant + 1) & 2) << 30);
  const U sin_bits = ((sine & ~odd) | (cosine & odd)) ^ ((quadrant & 2) << 30);
  *z0 = L::Mul(radius, L::Float(cos_bits));
  *z1 = L::Mul(radius, L::Float(sin_bits));
}

// A word as u in [0, 1) with 24 bits: every value is exact in f32.
template <class L>
PF_HD static inline typename L::F UnitUniform(typename L::U word) {
  return L::Mul(L::FromInt((typename L::I)(word >> 8)), L::Splat(0x1p-24f));
}

// One 2x2 block of correlated noise from four normals (method.md (25)):
// n' = sqrt(1 + gamma) (z - m) + sqrt(1 - 3 gamma) m with m the block mean, summed row by row.
template <class L>
PF_HD static inline typename L::F BlockMean(typename L::F top_pair, typename L::F bottom_pair) {
  return L::Mul(L::Add(top_pair, bottom_pair), L::Splat(0.25f));
}
template <class L>
PF_HD static inline typename L::F BlockNoise(typename L::F z, typename L::F mean, float spread,
                                             float common) {
  return L::Add(L::Mul(L::Splat(spread), L::Sub(z, mean)), L::Mul(L::Splat(common), mean));
}

PF_HD static inline void PhiloxWords(const PhiloxKey& key, uint64_t block, uint32_t* words) {
  words[0] = static_cast<uint32_t>(block);
  words[1] = static_cast<uint32_t>(block >> 32);
  words[2] = key.stream_lo;
  words[3] = key.stream_hi;
  PhiloxRounds<ScalarLanes>(words, key.seed_lo, key.seed_hi);
}
PF_HD static inline void PhiloxNormals(const PhiloxKey& key, uint64_t block, float* z) {
  uint32_t words[4];
  PhiloxWords(key, block, words);
  NormalPair<ScalarLanes>(words[0], words[1], z, z + 1);
  NormalPair<ScalarLanes>(words[2], words[3], z + 2, z + 3);
}
// Element i of a stream on its own, for code that has no four neighbours to share a block with.
PF_HD static inline float PhiloxNormalAt(const PhiloxKey& key, uint64_t element) {
  float z[4];
  PhiloxNormals(key, element / 4, z);
  return z[element % 4];
}
PF_HD static inline float PhiloxUniformAt(const PhiloxKey& key, uint64_t element) {
  uint32_t words[4];
  PhiloxWords(key, element / 4, words);
  return UnitUniform<ScalarLanes>(words[element % 4]);
}
