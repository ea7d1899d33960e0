#include "ops/mix/mix.h"
#include "ops/pointwise/blocks.h"

int32_t pf_cpu_mix(const PfArgs* args) {
  PF_TRY(CheckMix(args));
  PF_TRY(NeedMixTypes(args));
  const PfView &a = args->in[0], &b = args->in[1], &sigma = args->in[2], &y = args->out[0];
  const int64_t n = PfProduct(y, 1, y.rank), blocks = (n + kBlock - 1) / kBlock;
  const bool has_a = PfPresent(a), has_b = PfPresent(b);
  ForTasks(y.dims[0] * blocks, PfCount(y), [&](int64_t task) {
    alignas(64) float ba[kBlock], bb[kBlock], by[kBlock];
    const int64_t c = task % blocks * kBlock, m = MinOf(kBlock, n - c), at = task / blocks * n + c;
    const float s = PfData<float>(sigma)[task / blocks], rest = 1.0f - s;
    float* out = BeginWrite(y, at, by);
    if (has_a && has_b)
      Map(m, ReadBlock(a, at, m, ba), ReadBlock(b, at, m, bb), out,
          [=](Vf u, Vf v) { return s * u + rest * v; });
    else if (has_a)
      Map(m, ReadBlock(a, at, m, ba), out, [=](Vf u) { return s * u; });
    else if (has_b)
      Map(m, ReadBlock(b, at, m, bb), out, [=](Vf v) { return rest * v; });
    else
      memset(out, 0, m * sizeof(float));
    EndWrite(y, at, m, out);
  });
  return PF_OK;
}
