#include "ops/pointwise/blocks.h"
#include "ops/random/random.h"
#include "ops/random/random_simd.h"

int32_t pf_cpu_random_normal(const PfArgs* a) {
  const PfView& y = a->out[0];
  PF_TRY(NeedFloat(a, "random_normal", "y", y));
  const RandomParams& p = PfParams<RandomParams>(a);
  const PhiloxKey key = MakePhiloxKey(&p.seed_lo);
  const float mean = static_cast<float>(p.first), deviation = static_cast<float>(p.second);
  ForBlocks(PfCount(y), [&](int64_t at, int64_t n) {
    alignas(64) float buffer[kBlock];
    float* out = BeginWrite(y, at, buffer);
    FillRandom<NormalNumbers>(key, at, n, out);
    Map(n, out, out, [=](Vf z) { return mean + deviation * z; });
    EndWrite(y, at, n, out);
  });
  return PF_OK;
}

int32_t pf_cpu_random_uniform(const PfArgs* a) {
  const PfView& y = a->out[0];
  PF_TRY(NeedFloat(a, "random_uniform", "y", y));
  const RandomParams& p = PfParams<RandomParams>(a);
  const PhiloxKey key = MakePhiloxKey(&p.seed_lo);
  const float low = static_cast<float>(p.first), high = static_cast<float>(p.second), range = high - low;
  const Vf limit = Set1(UniformLimit(low, high));
  ForBlocks(PfCount(y), [&](int64_t at, int64_t n) {
    alignas(64) float buffer[kBlock];
    float* out = BeginWrite(y, at, buffer);
    FillRandom<UniformNumbers>(key, at, n, out);
    Map(n, out, out, [=](Vf u) { return Min(low + range * u, limit); });
    EndWrite(y, at, n, out);
  });
  return PF_OK;
}
