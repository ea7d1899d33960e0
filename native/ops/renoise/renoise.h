// renoise [x? [.., h, w], noise? [.., 2h, 2w]] -> [y [.., 2h, 2w]]: y = alpha Up2(x) + beta n', the stage
// jump of method.md (20). Without noise, n' is correlated block noise (25): z are the numbers random_normal
// (mean 0, std 1) gives y's shape for the same seed and stream, m the mean of z over a 2x2 block,
//   n' = sqrt(1 + gamma) (z - m) + sqrt(1 - 3 gamma) m.
// Without x only the noise is written.
#pragma once
#include "ops/random/random.h"

struct RenoiseParams {
  double alpha, beta, gamma;
  double seed_lo, seed_hi, stream_lo, stream_hi;
};

struct BlockCovariance {
  float spread, common;  // the square roots of the two eigenvalues
};
static inline BlockCovariance MakeBlockCovariance(double gamma) {
  // the largest gamma, 1/3, may leave a remainder just below 0
  return {static_cast<float>(sqrt(1 + gamma)), static_cast<float>(sqrt(fmax(1 - 3 * gamma, 0)))};
}

static inline int32_t CheckRenoise(const PfArgs* a) {
  const PfView &x = a->in[0], &noise = a->in[1], &y = a->out[0];
  const double gamma = PfParams<RenoiseParams>(a).gamma;
  bool fits = y.rank >= 2 && y.dims[y.rank - 1] % 2 == 0 && y.dims[y.rank - 2] % 2 == 0;
  if (fits && PfPresent(x)) {
    fits = x.rank == y.rank;
    for (int i = 0; fits && i < y.rank; ++i) fits = y.dims[i] == x.dims[i] * (i < y.rank - 2 ? 1 : 2);
  }
  if (!fits)
    return Fail(a, PF_ERR_SHAPE, "renoise: expected x [.., h, w] and y [.., 2h, 2w], received %s and %s",
                ShapeText(x).text, ShapeText(y).text);
  if (PfPresent(noise)) return NeedSameDims(a, "renoise", "noise", y, noise);
  if (!(gamma >= 0 && gamma <= 1.0 / 3 + 1e-9))
    return Fail(a, PF_ERR_OPTION, "renoise: expected gamma in [0, 1/3] but received %g", gamma);
  return PF_OK;
}

// The types that kernels take; the reference also takes f64.
static inline int32_t NeedRenoiseTypes(const PfArgs* a) {
  PF_TRY(NeedFloat(a, "renoise", "x", a->in[0]));
  PF_TRY(NeedFloat(a, "renoise", "noise", a->in[1]));
  return NeedFloat(a, "renoise", "y", a->out[0]);
}
