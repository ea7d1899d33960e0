#include "backends/cuda/sums.h"
#include "ops/mse/mse.h"

namespace {

struct SquaredError {
  FloatArray pred, target;
  int64_t n;
  __device__ double operator()(int64_t sample, int64_t k, int64_t) const {
    const int64_t i = sample * n + k;
    const double d = ReadOne(pred, i) - ReadOne(target, i);
    return d * d;
  }
};
struct PutMean {
  float* loss;
  double n;
  __device__ void operator()(int64_t i, double sum) const { loss[i] = static_cast<float>(sum / n); }
};

struct Backward {
  const float* dloss;
  int64_t n;
  __device__ void operator()(int64_t i, const float* x, float* y) const {
    y[0] = static_cast<float>(2.0 / static_cast<double>(n) * dloss[i / n]) * (x[0] - x[1]);
  }
};

}  // namespace

int32_t pf_cuda_mse(const PfArgs* a) {
  const PfView &pred = a->in[0], &target = a->in[1], &loss = a->out[0];
  PF_TRY(CheckMse(a, "mse", loss));
  PF_TRY(NeedMseTypes(a, "mse", "loss", loss));
  const int64_t n = PfProduct(pred, 1, pred.rank);
  return Sums(a, pred.dims[0], n, 1, SquaredError{ArrayOf(pred), ArrayOf(target), n},
              PutMean{PfData<float>(loss), static_cast<double>(n)});
}

int32_t pf_cuda_mse_backward(const PfArgs* a) {
  const PfView &pred = a->in[0], &target = a->in[1], &dloss = a->in[2], &dpred = a->out[0];
  PF_TRY(CheckMse(a, "mse_backward", dloss));
  PF_TRY(NeedMseTypes(a, "mse_backward", "dloss", dloss));
  PF_TRY(NeedFloat(a, "mse_backward", "dpred", dpred));
  PF_TRY(NeedSameDims(a, "mse_backward", "dpred", pred, dpred));
  const FloatArrays<2, 1> arrays{{ArrayOf(pred), ArrayOf(target)}, {ArrayOf(dpred)}};
  return Elements(a, arrays, PfCount(pred), Backward{PfData<float>(dloss), PfProduct(pred, 1, pred.rank)});
}
