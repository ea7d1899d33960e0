// random_normal [] -> [y]: mean + std z; random_uniform [] -> [y]: low + (high - low) u in [low, high).
// Element i takes word i mod 4 of Philox block i / 4 (core/philox.h), so the numbers depend on seed, stream
// and position only. f32 results have the same bits everywhere; bf16 results are those, rounded.
#pragma once
#include "core/philox.h"
#include "ops/pointwise/shape_text.h"

struct RandomParams {
  double first, second;  // mean and std, or low and high
  double seed_lo, seed_hi, stream_lo, stream_hi;
};

static inline PhiloxKey MakePhiloxKey(const double* words) {
  return {static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[2]),
          static_cast<uint32_t>(words[3])};
}

// Rounding may reach high; the float below it keeps the interval half open.
static inline float UniformLimit(float low, float high) { return high > low ? nextafterf(high, low) : low; }
