#include "backends/ref/ref.h"
#include "ops/copy/copy.h"

namespace {

void CopyElement(const PfView& x, int64_t i, const PfView& y, int64_t j) {
  const size_t size = PfSize(x.dtype);
  memcpy(static_cast<char*>(y.data) + j * size, static_cast<const char*>(x.data) + i * size, size);
}

}  // namespace

int32_t pf_ref_fill(const PfArgs* a) {
  for (int64_t i = 0; i < PfCount(a->out[0]); ++i) Set(a->out[0], i, PfParams<FillParams>(a).value);
  return PF_OK;
}

int32_t pf_ref_copy_region(const PfArgs* a) {
  CopyRegion r;
  PF_TRY(MakeCopyRegion(a, &r));
  const PfView &x = a->in[0], &y = a->out[0];
  for (int64_t o = 0; o < r.outer; ++o) {
    for (int64_t i = 0; i < r.count * r.inner; ++i) {
      const int64_t from = (o * r.x_axis + r.x_offset) * r.inner + i,
                    to = (o * r.y_axis + r.y_offset) * r.inner + i;
      if (r.accumulate)
        Set(y, to, Get(y, to) + Get(x, from));
      else if (x.dtype == y.dtype)
        CopyElement(x, from, y, to);
      else
        Set(y, to, Get(x, from));
    }
  }
  return PF_OK;
}

int32_t pf_ref_permute(const PfArgs* a) {
  int64_t strides[PF_MAX_RANK];
  PF_TRY(PermuteStrides(a, strides));
  const PfView& y = a->out[0];
  for (int64_t i = 0; i < PfCount(y); ++i) {
    int64_t rest = i, from = 0;
    for (int j = y.rank - 1; j >= 0; --j) from += rest % y.dims[j] * strides[j], rest /= y.dims[j];
    CopyElement(a->in[0], from, y, i);
  }
  return PF_OK;
}
