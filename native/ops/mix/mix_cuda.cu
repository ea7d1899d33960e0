#include "backends/cuda/elementwise.h"
#include "ops/mix/mix.h"

namespace {

struct Mix {
  const float* sigma;
  int64_t per_sample;
  __device__ void operator()(int64_t i, const float* x, float* y) const {
    const float s = sigma[i / per_sample];
    y[0] = s * x[0] + (1.0f - s) * x[1];
  }
};

}  // namespace

int32_t pf_cuda_mix(const PfArgs* args) {
  PF_TRY(CheckMix(args));
  PF_TRY(NeedMixTypes(args));
  const PfView &a = args->in[0], &b = args->in[1], &sigma = args->in[2], &y = args->out[0];
  const FloatArrays<2, 1> arrays{{ArrayOf(a), ArrayOf(b)}, {ArrayOf(y)}};
  return Elements(args, arrays, PfCount(y), Mix{PfData<float>(sigma), PfProduct(y, 1, y.rank)});
}
