// Division by a number that is known before the launch: a multiplication and a shift.
#pragma once
#include "backends/cuda/device.h"

struct FastDiv {
  uint32_t divisor, multiplier, shift;

  FastDiv() = default;
  // 1 <= d < 2^31
  explicit FastDiv(int64_t d) : divisor(static_cast<uint32_t>(d)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier =
        static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor) / divisor + 1);
  }
  // For n < 2^31.
  __device__ __forceinline__ uint32_t Quotient(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> 32) + n) >> shift;
  }
  // Divides n and returns the remainder.
  __device__ __forceinline__ int Split(int* n) const {
    const uint32_t q = Quotient(static_cast<uint32_t>(*n));
    const int rest = *n - static_cast<int>(q * divisor);
    *n = static_cast<int>(q);
    return rest;
  }
};
