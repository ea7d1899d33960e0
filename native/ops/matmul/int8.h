// Products in eight bits: the arithmetic that every backend shares, so that all quantise to the same bits.
//
// A row of x and a row of w are cut into the same groups of at most 1,024 values. Each group is rotated,
// which spreads what stands out over many values and leaves products as they are but for a factor, is divided
// by a scale of its own and rounded to whole numbers from -127 to 127:
//   x w = sum over groups of scale_x scale_w sum(q_x q_w) / spread.
// Inner sums stay below 2^24: f32 holds them exactly, in whatever order they are added.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

static constexpr int64_t kInt8Longest = 1024, kInt8Align = 64;

struct Int8Groups {
  int64_t count, size;  // the last one may be shorter
  int64_t Length(int64_t g, int64_t k) const { return k - g * size < size ? k - g * size : size; }
};

static inline Int8Groups Int8GroupsOf(int64_t k) {
  const int64_t count = (k + kInt8Longest - 1) / kInt8Longest, size = (k + count - 1) / count;
  return {count, (size + kInt8Align - 1) / kInt8Align * kInt8Align};
}

// How many values of a group of n are mixed with each other: a power of two of runs, each long enough for
// vectors.
static inline int64_t Int8Spread(int64_t n) {
  int64_t spread = 1;
  while (n % (2 * spread) == 0 && n / (2 * spread) >= 16) spread *= 2;
  return spread;
}

// v becomes H v in place, H the Hadamard transform over runs that are n / spread long: HT H = spread.
static inline void Int8Rotate(float* v, int64_t n) {
  for (int64_t run = n / Int8Spread(n); run < n; run *= 2)
    for (int64_t i = 0; i < n; i += 2 * run)
      for (int64_t j = i; j < i + run; ++j) {
        const float a = v[j], b = v[j + run];
        v[j] = a + b;
        v[j + run] = a - b;
      }
}

// The scale of a rotated group and what its values are multiplied by. NaN and infinity reach the scale, and
// by it the result.
struct Int8Scale {
  float scale, inverse;
};
static inline Int8Scale Int8ScaleOf(float largest) {
  // Smaller values than that are zeros: their inverse would not be finite.
  if (largest < 1e-30f) return {0, 0};
  return {largest / 127.0f, 127.0f / largest};
}
