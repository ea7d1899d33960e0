#include "backends/cuda/elementwise.h"
#include "ops/euler/euler.h"

namespace {

struct Step {
  float step, guidance;
  bool guided;
  __device__ void operator()(int64_t, const float* x, float* y) const {
    const float v = guided ? x[2] + guidance * (x[1] - x[2]) : x[1];
    y[0] = x[0] + step * v;
  }
};

}  // namespace

int32_t pf_cuda_euler(const PfArgs* a) {
  PF_TRY(CheckEuler(a));
  PF_TRY(NeedEulerTypes(a));
  const PfView &x = a->in[0], &cond = a->in[1], &uncond = a->in[2], &y = a->out[0];
  const EulerParams& p = PfParams<EulerParams>(a);
  const FloatArrays<3, 1> arrays{{ArrayOf(x), ArrayOf(cond), ArrayOf(uncond)}, {ArrayOf(y)}};
  return Elements(a, arrays, PfCount(x),
                  Step{static_cast<float>(p.delta_sigma), static_cast<float>(p.guidance), PfPresent(uncond)});
}
