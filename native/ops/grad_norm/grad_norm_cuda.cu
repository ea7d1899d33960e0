#include "backends/cuda/sums.h"
#include "ops/grad_norm/grad_norm.h"

namespace {

struct Square {
  FloatArray g;
  __device__ double operator()(int64_t, int64_t i, int64_t) const {
    const double x = ReadOne(g, i);
    return x * x;
  }
};
struct PutNorm {
  float* y;
  double max_norm;
  __device__ void operator()(int64_t, double sum) const {
    const double norm = sqrt(sum);
    y[0] = static_cast<float>(norm);
    y[1] = static_cast<float>(ClipCoefficient(norm, max_norm));
  }
};

}  // namespace

int32_t pf_cuda_grad_norm(const PfArgs* a) {
  PF_TRY(CheckGradNorm(a));
  PF_TRY(NeedGradNormTypes(a));
  const PfView &g = a->in[0], &y = a->out[0];
  return Sums(a, 1, PfCount(g), 1, Square{ArrayOf(g)},
              PutNorm{PfData<float>(y), PfParams<GradNormParams>(a).max_norm});
}
