#include "ops/downsample/pairs.h"
#include "ops/upsample/upsample.h"

int32_t pf_cpu_upsample(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckUpsample(a, "upsample", x, y));
  PF_TRY(NeedFloat(a, "upsample", "x", x));
  PF_TRY(NeedFloat(a, "upsample", "y", y));
  if (PfCount(x)) DoublePlanes(x, y, PfProduct(x, 0, x.rank - 1), x.dims[x.rank - 1], 1.0f);
  return PF_OK;
}

int32_t pf_cpu_upsample_backward(const PfArgs* a) {
  const PfView &dy = a->in[0], &dx = a->out[0];
  PF_TRY(CheckUpsample(a, "upsample_backward", dx, dy));
  PF_TRY(NeedFloat(a, "upsample_backward", "dy", dy));
  PF_TRY(NeedFloat(a, "upsample_backward", "dx", dx));
  const float scale = static_cast<float>(PfParams<UpsampleBackwardParams>(a).scale);
  if (PfCount(dx)) HalvePlanes(dy, dx, PfProduct(dx, 0, dx.rank - 1), dx.dims[dx.rank - 1], scale);
  return PF_OK;
}
