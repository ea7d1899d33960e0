#include "backends/ref/ref.h"
#include "ops/random/random.h"

// Floats on purpose: this op promises bits, and the arithmetic of philox.h is what it promises.
int32_t pf_ref_random_normal(const PfArgs* a) {
  const RandomParams& p = PfParams<RandomParams>(a);
  const PhiloxKey key = MakePhiloxKey(&p.seed_lo);
  const float mean = static_cast<float>(p.first), deviation = static_cast<float>(p.second);
  for (int64_t i = 0; i < PfCount(a->out[0]); ++i) {
    const float z = deviation * PhiloxNormalAt(key, i);
    Set(a->out[0], i, mean + z);
  }
  return PF_OK;
}

int32_t pf_ref_random_uniform(const PfArgs* a) {
  const RandomParams& p = PfParams<RandomParams>(a);
  const PhiloxKey key = MakePhiloxKey(&p.seed_lo);
  const float low = static_cast<float>(p.first), high = static_cast<float>(p.second), range = high - low;
  for (int64_t i = 0; i < PfCount(a->out[0]); ++i) {
    const float offset = range * PhiloxUniformAt(key, i);
    Set(a->out[0], i, fminf(low + offset, UniformLimit(low, high)));
  }
  return PF_OK;
}
