// Products in eight bits: the arithmetic that every backend shares, so that all quantise to the same bits.
//
// A row of x and a row of w are cut into the same groups of at most 2,048 values. In each, blocks of 64 are
// rotated by a Hadamard matrix, which spreads what stands out over 64 values and leaves products as they are;
// then it is divided by a scale of its own and rounded to whole numbers from -127 to 127:
//   x w = sum over groups of scale_x scale_w sum(q_x q_w).
// Inner sums are whole numbers of 32 bits: exact, in whatever order they are added.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

static constexpr int64_t kInt8Longest = 2048, kInt8Align = 64, kInt8Block = 64;

struct Int8Groups {
  int64_t count, size;  // the last one may be shorter
  int64_t Length(int64_t g, int64_t k) const { return k - g * size < size ? k - g * size : size; }
};

static inline Int8Groups Int8GroupsOf(int64_t k) {
  const int64_t count = (k + kInt8Longest - 1) / kInt8Longest, size = (k + count - 1) / count;
  return {count, (size + kInt8Align - 1) / kInt8Align * kInt8Align};
}

// v becomes H v / 8 in place for every whole block, H the Hadamard matrix of 64 rows: HT H = 64. Values of
// the last, incomplete block stay.
static inline void Int8Rotate(float* v, int64_t n) {
  for (; n >= kInt8Block; n -= kInt8Block, v += kInt8Block) {
    for (int i = 0; i < kInt8Block; ++i) v[i] *= 0.125f;
    for (int run = 1; run < kInt8Block; run *= 2)
      for (int i = 0; i < kInt8Block; ++i) {
        if (i & run) continue;
        const float a = v[i], b = v[i + run];
        v[i] = a + b;
        v[i + run] = a - b;
      }
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
