#include "backends/ref/ref.h"
#include "ops/renoise/renoise.h"

int32_t pf_ref_renoise(const PfArgs* a) {
  PF_TRY(CheckRenoise(a));
  const PfView &x = a->in[0], &noise = a->in[1], &y = a->out[0];
  const RenoiseParams& p = PfParams<RenoiseParams>(a);
  const PhiloxKey key = MakePhiloxKey(&p.seed_lo);
  const BlockCovariance covariance = MakeBlockCovariance(p.gamma);
  const int64_t w = y.dims[y.rank - 1] / 2;
  for (int64_t block = 0; block < PfCount(y) / 4; ++block) {
    const int64_t top = block / w * 4 * w + block % w * 2;
    const int64_t at[4] = {top, top + 1, top + 2 * w, top + 2 * w + 1};
    float z[4];
    for (int i = 0; i < 4; ++i) z[i] = PhiloxNormalAt(key, at[i]);
    // Floats on purpose: the noise is promised bit by bit.
    const float mean = BlockMean<ScalarLanes>(z[0] + z[1], z[2] + z[3]);
    for (int i = 0; i < 4; ++i) {
      const double n = PfPresent(noise)
                           ? Get(noise, at[i])
                           : BlockNoise<ScalarLanes>(z[i], mean, covariance.spread, covariance.common);
      Set(y, at[i], (PfPresent(x) ? p.alpha * Get(x, block) : 0) + p.beta * n);
    }
  }
  return PF_OK;
}
