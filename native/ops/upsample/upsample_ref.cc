#include "backends/ref/ref.h"
#include "ops/upsample/upsample.h"

int32_t pf_ref_upsample(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckUpsample(a, "upsample", x, y));
  const int64_t w = y.dims[y.rank - 1];
  for (int64_t i = 0; i < PfCount(y); ++i) Set(y, i, Get(x, i / w / 2 * (w / 2) + i % w / 2));
  return PF_OK;
}

int32_t pf_ref_upsample_backward(const PfArgs* a) {
  const PfView &dy = a->in[0], &dx = a->out[0];
  PF_TRY(CheckUpsample(a, "upsample_backward", dx, dy));
  const int64_t w = dx.dims[dx.rank - 1];
  for (int64_t i = 0; i < PfCount(dx); ++i) {
    const int64_t at = i / w * 4 * w + i % w * 2;
    const double sum = Get(dy, at) + Get(dy, at + 1) + Get(dy, at + 2 * w) + Get(dy, at + 2 * w + 1);
    Set(dx, i, PfParams<UpsampleBackwardParams>(a).scale * sum);
  }
  return PF_OK;
}
