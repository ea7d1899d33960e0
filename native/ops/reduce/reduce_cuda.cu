#include "backends/cuda/sums.h"
#include "ops/reduce/reduce.h"

namespace {

struct Term {
  FloatArray x;
  int64_t count, inner;
  __device__ double operator()(int64_t outer, int64_t row, int64_t column) const {
    return ReadOne(x, (outer * count + row) * inner + column);
  }
};
struct Put {
  FloatArray y;
  double scale;
  bool accumulate;
  __device__ void operator()(int64_t i, double sum) const {
    WriteOne(y, i, static_cast<float>((accumulate ? ReadOne(y, i) : 0) + scale * sum));
  }
};

}  // namespace

int32_t pf_cuda_sum(const PfArgs* a) {
  PF_TRY(CheckSum(a));
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(NeedFloat(a, "sum", "x", x));
  PF_TRY(NeedFloat(a, "sum", "y", y));
  const SumParams& p = PfParams<SumParams>(a);
  const int64_t count = static_cast<int64_t>(p.count), inner = static_cast<int64_t>(p.inner);
  return Sums(a, static_cast<int64_t>(p.outer), count, inner, Term{ArrayOf(x), count, inner},
              Put{ArrayOf(y), p.scale, p.accumulate != 0});
}
