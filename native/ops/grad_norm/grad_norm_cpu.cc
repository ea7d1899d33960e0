#include "ops/grad_norm/grad_norm.h"
#include "ops/pointwise/blocks.h"

int32_t pf_cpu_grad_norm(const PfArgs* a) {
  PF_TRY(CheckGradNorm(a));
  PF_TRY(NeedGradNormTypes(a));
  const PfView &g = a->in[0], &y = a->out[0];
  // Squares in double neither overflow nor vanish; fixed lanes and blocks give the same bits on any number of
  // threads.
  const int64_t n = PfCount(g), blocks = (n + kBlock - 1) / kBlock;
  double* partial = static_cast<double*>(a->context->scratch(a->context, (blocks + 1) * sizeof(double)));
  if (!partial) return Fail(a, PF_ERR_MEMORY, "grad_norm: no scratch memory");
  ForBlocks(n, [&](int64_t at, int64_t m) {
    alignas(64) float buffer[kBlock];
    const float* p = ReadBlock(g, at, m, buffer);
    double lanes[32] = {};
    int64_t i = 0;
    for (; i + 32 <= m; i += 32)
      for (int k = 0; k < 32; ++k) lanes[k] += static_cast<double>(p[i + k]) * p[i + k];
    for (; i < m; ++i) lanes[i % 32] += static_cast<double>(p[i]) * p[i];
    for (int w = 16; w; w /= 2)
      for (int k = 0; k < w; ++k) lanes[k] += lanes[k + w];
    partial[at / kBlock] = lanes[0];
  });
  double sum = 0;
  for (int64_t i = 0; i < blocks; ++i) sum += partial[i];
  PfData<float>(y)[0] = static_cast<float>(sqrt(sum));
  PfData<float>(y)[1] = static_cast<float>(ClipCoefficient(sqrt(sum), PfParams<GradNormParams>(a).max_norm));
  return PF_OK;
}
