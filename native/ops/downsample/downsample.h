// downsample [x [.., h, w]] -> [y [.., h/2, w/2]]: bilinear with half-pixel centres, no antialias, times
// scale (method.md (1)); for even sizes exactly the 2x2 mean. h, w >= 2, halves rounded down.
// downsample_backward [dy] -> [dx [.., h, w]]: its transpose.
//
// Outputs are at least 2 inputs apart, so each input row feeds at most one output row: both directions are
// gathers.
#pragma once
#include <math.h>

#include "core/half.h"
#include "ops/pointwise/shape_text.h"

struct DownsampleParams {
  double scale;
};

// Output i of a line of n reads first[i] and first[i] + 1 (or twice the last) with weights 1 - t and t.
struct DownTap {
  int64_t first, second;
  double t;
};
PF_HD static inline DownTap DownTapOf(int64_t i, int64_t n) {
  const double source = fmax((i + 0.5) * n / static_cast<double>(n / 2) - 0.5, 0.0);
  const int64_t first = static_cast<int64_t>(source) < n - 1 ? static_cast<int64_t>(source) : n - 1;
  return {first, first + 1 < n ? first + 1 : first, source - first};
}

// The one output that reads input i of a line of n, and its weight; output -1: none does.
struct DownTarget {
  int64_t output;
  double weight;
};
PF_HD static inline DownTarget DownTargetOf(int64_t i, int64_t n) {
  // Output k starts at input 2k or 2k + 1.
  for (int64_t k = i / 2; k >= 0 && k >= i / 2 - 1; --k) {
    if (k >= n / 2) continue;
    const DownTap tap = DownTapOf(k, n);
    if (tap.first == i || tap.second == i)
      return {k, (tap.first == i ? 1 - tap.t : 0) + (tap.second == i ? tap.t : 0)};
  }
  return {-1, 0};
}

struct Planes {
  int64_t count, h, w;  // of the large side
};
static inline int32_t MakePlanes(const PfArgs* a, const char* op, const PfView& large, const PfView& small,
                                 Planes* p) {
  const int r = large.rank;
  bool fits = r >= 2 && small.rank == r && large.dims[r - 1] >= 2 && large.dims[r - 2] >= 2 &&
              small.dims[r - 1] == large.dims[r - 1] / 2 && small.dims[r - 2] == large.dims[r - 2] / 2;
  for (int i = 0; fits && i < r - 2; ++i) fits = large.dims[i] == small.dims[i];
  if (!fits)
    return Fail(a, PF_ERR_SHAPE,
                "%s: expected [.., h, w] and [.., h/2, w/2] with h, w >= 2, received %s and %s", op,
                ShapeText(large).text, ShapeText(small).text);
  *p = {PfProduct(large, 0, r - 2), large.dims[r - 2], large.dims[r - 1]};
  return PF_OK;
}
