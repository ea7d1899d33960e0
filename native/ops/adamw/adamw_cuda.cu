#include "backends/cuda/elementwise.h"
#include "ops/adamw/adamw.h"

namespace {

struct AdamwCall {
  FloatArray grad, param, m, v, shadow;
  const float* clip;
  AdamwCoefficients k;
  int64_t n;
};

template <int N>
__global__ void __launch_bounds__(kElementThreads) AdamwKernel(AdamwCall call) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  const float clip = call.clip ? call.clip[1] : 1.0f;
  // Not finite: a step to be skipped, which is known on the device only.
  if (at >= call.n || !(clip - clip == 0)) return;
  const AdamwCoefficients& k = call.k;
  float grad[N], x[N], m[N], v[N];
  ReadPack<N>(call.grad, at, grad);
  ReadPack<N>(call.param, at, x);
  ReadPack<N>(call.m, at, m);
  ReadPack<N>(call.v, at, v);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = clip * grad[i];
    m[i] = k.beta1 * m[i] + k.rest1 * g;
    v[i] = k.beta2 * v[i] + k.rest2 * g * g;
    x[i] = k.keep * x[i] - k.step * m[i] / (sqrtf(k.scale2 * v[i]) + k.eps);
  }
  WritePack<N>(call.param, at, x);
  WritePack<N>(call.m, at, m);
  WritePack<N>(call.v, at, v);
  WritePack<N>(call.shadow, at, x);
}

}  // namespace

int32_t pf_cuda_adamw(const PfArgs* a) {
  PF_TRY(CheckAdamw(a));
  PF_TRY(NeedAdamwTypes(a));
  const bool clipped = a->n_in > 1 && PfPresent(a->in[1]);
  const FloatArray none = {nullptr, PF_F32};
  const AdamwCall call = {ArrayOf(a->in[0]),
                          ArrayOf(a->out[0]),
                          ArrayOf(a->out[1]),
                          ArrayOf(a->out[2]),
                          a->n_out > 3 ? ArrayOf(a->out[3]) : none,
                          clipped ? PfData<float>(a->in[1]) : nullptr,
                          MakeAdamwCoefficients(PfParams<AdamwParams>(a)),
                          PfCount(a->in[0])};
  if (call.n == 0) return PF_OK;
  const bool packs = call.n % 4 == 0 && Packs(call.grad) && Packs(call.param) && Packs(call.m) &&
                     Packs(call.v) && Packs(call.shadow);
  const dim3 grid(
      static_cast<unsigned>(CeilDiv(call.n, static_cast<int64_t>(kElementThreads) * (packs ? 4 : 1))));
  return Launch(a, packs ? &AdamwKernel<4> : &AdamwKernel<1>, grid, kElementThreads, 0, call);
}
