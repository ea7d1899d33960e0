// 16-bit floats as plain bits, with conversions that round to nearest even on every compiler and device.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define PF_HD __host__ __device__
#else
#define PF_HD
#endif

struct Bf16 {
  uint16_t bits;
};

PF_HD static inline float ToFloat(float x) { return x; }
PF_HD static inline float ToFloat(Bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
PF_HD static inline Bf16 ToBf16(float x) {
#if defined(__CUDA_ARCH__)  // one instruction; NaN gets another payload
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40)};  // keep NaN a NaN
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
#endif
}
template <class T>
PF_HD static inline T FromFloat(float x);
template <>
PF_HD inline float FromFloat<float>(float x) {
  return x;
}
template <>
PF_HD inline Bf16 FromFloat<Bf16>(float x) {
  return ToBf16(x);
}

PF_HD static inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 0x1f, mantissa = h & 0x3ff, u;
  if (exponent == 0x1f) {
    u = sign | 0x7f800000u | (mantissa << 13);
  } else if (exponent != 0) {
    u = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa == 0) {
    u = sign;
  } else {  // subnormal: shift until the hidden bit appears
    exponent = 113;
    while (!(mantissa & 0x400)) mantissa <<= 1, --exponent;
    u = sign | (exponent << 23) | ((mantissa & 0x3ff) << 13);
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

PF_HD static inline uint16_t FloatToHalf(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00;
  if (u >= 0x477ff000u) return sign | 0x7c00;
  if (u < 0x38800000u) {  // subnormal half: let the float adder do the rounding
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f;
    memcpy(&u, &f, 4);
    return sign | static_cast<uint16_t>(u - 0x3f000000u);
  }
  const uint32_t odd = (u >> 13) & 1;
  return sign | static_cast<uint16_t>((u - 0x38000000u + 0xfff + odd) >> 13);
}
