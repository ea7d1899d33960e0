#include "backends/cuda/elementwise.h"
#include "core/element.h"
#include "ops/cast/cast.h"

namespace {

// f16 to a float type: how weights come from files.
struct FromHalf {
  const uint16_t* x;
  __device__ void operator()(int64_t i, const float*, float* y) const { y[0] = HalfToFloat(x[i]); }
};
struct Same {
  __device__ void operator()(int64_t, const float* x, float* y) const { y[0] = x[0]; }
};

// Every other pair, through double as the reference does.
__global__ void __launch_bounds__(kElementThreads) CastKernel(PfView x, PfView y, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (i < n) Set(y, i, Get(x, i));
}

}  // namespace

int32_t pf_cuda_cast(const PfArgs* a) {
  PF_TRY(CheckCast(a));
  const PfView &x = a->in[0], &y = a->out[0];
  const int64_t n = PfCount(x);
  if (n == 0) return PF_OK;
  if (x.dtype == y.dtype) return DeviceCopy(a, y.data, x.data, n * PfSize(x.dtype));
  if (PfIsFloat(x) && PfIsFloat(y)) {
    const FloatArrays<1, 1> arrays{{ArrayOf(x)}, {ArrayOf(y)}};
    return Elements(a, arrays, n, Same{});
  }
  if (x.dtype == PF_F16 && PfIsFloat(y)) {
    const FloatArrays<0, 1> arrays{{}, {ArrayOf(y)}};
    return Elements(a, arrays, n, FromHalf{PfData<uint16_t>(x)});
  }
  return Launch(a, &CastKernel, dim3(static_cast<unsigned>(CeilDiv(n, kElementThreads))), kElementThreads, 0,
                x, y, n);
}
