#include "ops/downsample/downsample_pairs.cuh"
#include "ops/upsample/upsample.h"

int32_t pf_cuda_upsample(const PfArgs* a) {
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(CheckUpsample(a, "upsample", x, y));
  PF_TRY(NeedFloat(a, "upsample", "x", x));
  PF_TRY(NeedFloat(a, "upsample", "y", y));
  return DoublePlanes(a, x, y, 1.0f);
}

int32_t pf_cuda_upsample_backward(const PfArgs* a) {
  const PfView &dy = a->in[0], &dx = a->out[0];
  PF_TRY(CheckUpsample(a, "upsample_backward", dx, dy));
  PF_TRY(NeedFloat(a, "upsample_backward", "dy", dy));
  PF_TRY(NeedFloat(a, "upsample_backward", "dx", dx));
  return HalvePlanes(a, dy, dx, static_cast<float>(PfParams<UpsampleBackwardParams>(a).scale));
}
