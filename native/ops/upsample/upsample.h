// upsample [x [.., h, w]] -> [y [.., 2h, 2w]]: every value repeated into its 2x2 block (method.md (2)).
// upsample_backward [dy] -> [dx]: scale times the sum of the block.
#pragma once
#include "ops/pointwise/shape_text.h"

struct UpsampleBackwardParams {
  double scale;
};

static inline int32_t CheckUpsample(const PfArgs* a, const char* op, const PfView& small,
                                    const PfView& large) {
  const int r = small.rank;
  bool fits = r >= 2 && large.rank == r && large.dims[r - 1] == 2 * small.dims[r - 1] &&
              large.dims[r - 2] == 2 * small.dims[r - 2];
  for (int i = 0; fits && i < r - 2; ++i) fits = large.dims[i] == small.dims[i];
  if (fits) return PF_OK;
  return Fail(a, PF_ERR_SHAPE, "%s: expected [.., h, w] and [.., 2h, 2w], received %s and %s", op,
              ShapeText(small).text, ShapeText(large).text);
}
