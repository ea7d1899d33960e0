#include "ops/mse/mse.h"
#include "ops/pointwise/blocks.h"

int32_t pf_cpu_mse(const PfArgs* a) {
  const PfView &pred = a->in[0], &target = a->in[1], &loss = a->out[0];
  PF_TRY(CheckMse(a, "mse", loss));
  PF_TRY(NeedMseTypes(a, "mse", "loss", loss));
  // Partial sums of fixed blocks, added in order: the loss does not depend on the number of threads.
  const int64_t batch = pred.dims[0], n = PfProduct(pred, 1, pred.rank), blocks = (n + kBlock - 1) / kBlock;
  double* partial =
      static_cast<double*>(a->context->scratch(a->context, (batch * blocks + 1) * sizeof(double)));
  if (!partial) return Fail(a, PF_ERR_MEMORY, "mse: no scratch memory");
  ForTasks(batch * blocks, PfCount(pred), [&](int64_t task) {
    alignas(64) float bp[kBlock], bt[kBlock];
    const int64_t c = task % blocks * kBlock, m = MinOf(kBlock, n - c), at = task / blocks * n + c;
    const float *p = ReadBlock(pred, at, m, bp), *t = ReadBlock(target, at, m, bt);
    double lanes[16] = {};
    int64_t i = 0;
    for (; i + 16 <= m; i += 16) {
      for (int k = 0; k < 16; ++k) {
        const double d = p[i + k] - t[i + k];
        lanes[k] += d * d;
      }
    }
    for (; i < m; ++i) {
      const double d = p[i] - t[i];
      lanes[i % 16] += d * d;
    }
    for (int w = 8; w; w /= 2)
      for (int k = 0; k < w; ++k) lanes[k] += lanes[k + w];
    partial[task] = lanes[0];
  });
  for (int64_t b = 0; b < batch; ++b) {
    double sum = 0;
    for (int64_t i = 0; i < blocks; ++i) sum += partial[b * blocks + i];
    PfData<float>(loss)[b] = static_cast<float>(sum / n);
  }
  return PF_OK;
}

int32_t pf_cpu_mse_backward(const PfArgs* a) {
  const PfView &pred = a->in[0], &target = a->in[1], &dloss = a->in[2], &dpred = a->out[0];
  PF_TRY(CheckMse(a, "mse_backward", dloss));
  PF_TRY(NeedMseTypes(a, "mse_backward", "dloss", dloss));
  PF_TRY(NeedFloat(a, "mse_backward", "dpred", dpred));
  PF_TRY(NeedSameDims(a, "mse_backward", "dpred", pred, dpred));
  const int64_t n = PfProduct(pred, 1, pred.rank), blocks = (n + kBlock - 1) / kBlock;
  ForTasks(pred.dims[0] * blocks, PfCount(pred), [&](int64_t task) {
    alignas(64) float bp[kBlock], bt[kBlock], bd[kBlock];
    const int64_t c = task % blocks * kBlock, m = MinOf(kBlock, n - c), at = task / blocks * n + c;
    const float factor = static_cast<float>(2.0 / n * PfData<float>(dloss)[task / blocks]);
    float* out = BeginWrite(dpred, at, bd);
    Map(m, ReadBlock(pred, at, m, bp), ReadBlock(target, at, m, bt), out,
        [=](Vf u, Vf v) { return factor * (u - v); });
    EndWrite(dpred, at, m, out);
  });
  return PF_OK;
}
