#include "backends/ref/ref.h"
#include "ops/cast/cast.h"

int32_t pf_ref_cast(const PfArgs* a) {
  PF_TRY(CheckCast(a));
  const PfView &x = a->in[0], &y = a->out[0];
  for (int64_t i = 0; i < PfCount(x); ++i) {
    const size_t size = PfSize(x.dtype);
    if (x.dtype == y.dtype)  // i64 does not fit a double
      memcpy(static_cast<char*>(y.data) + i * size, static_cast<const char*>(x.data) + i * size, size);
    else
      Set(y, i, Get(x, i));
  }
  return PF_OK;
}
