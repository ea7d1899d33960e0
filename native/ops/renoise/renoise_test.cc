#include "ops/renoise/renoise.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "core/op_test.h"

namespace {

// 2^20 blocks of the scalar noise, which the cases below find in the kernels bit by bit: covariance (1 + g) I
// - g J.
void CheckCovariance(double gamma) {
  const PhiloxKey key{2024, 1, 3, 4};
  const BlockCovariance covariance = MakeBlockCovariance(gamma);
  const int64_t n = 1 << 20;
  double sums[4][4] = {}, block_sum = 0;
  for (int64_t block = 0; block < n; ++block) {
    float z[4];
    double v[4], sum = 0;
    PhiloxNormals(key, block, z);
    const float mean = BlockMean<ScalarLanes>(z[0] + z[1], z[2] + z[3]);
    for (int i = 0; i < 4; ++i) {
      v[i] = BlockNoise<ScalarLanes>(z[i], mean, covariance.spread, covariance.common);
      sum += v[i];
    }
    block_sum = std::fmax(block_sum, std::fabs(sum));
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) sums[i][j] += v[i] * v[j];
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const double got = sums[i][j] / n, want = i == j ? 1 : -gamma;
      if (std::fabs(got - want) < 0.01) continue;
      std::printf("FAIL renoise: covariance (%d, %d) for gamma %g is %g\n", i, j, gamma, got);
      std::exit(1);
    }
  }
  if (gamma > 0.33 && block_sum > 1e-5) {
    std::printf("FAIL renoise: a block of gamma 1/3 sums to %g\n", block_sum);
    std::exit(1);
  }
}

}  // namespace

PF_CASES(renoise) {
  CheckCovariance(1.0 / 3);
  CheckCovariance(0.2);
  const int64_t sizes[][3] = {{1, 1, 1},   {2, 3, 3},    {3, 2, 5},   {2, 3, 24},
                              {1, 2, 700}, {1, 3, 2101}, {40, 24, 40}};
  for (auto& s : sizes) {
    const op_test::Dims small{s[0], s[1], s[2]}, large{s[0], 2 * s[1], 2 * s[2]};
    for (double gamma : {1.0 / 3, 0.2, 0.0}) {
      // Noise alone has equal bits; with two threads on the largest size that covers threads, too.
      test.Case("renoise")
          .Missing()
          .Missing()
          .Out(large)
          .Scalars({1, 1, gamma, 5, 6, 7, 8})
          .Tolerance(0, 4e-3)
          .Run();
      test.Case("renoise")
          .In(small)
          .Missing()
          .Out(large)
          .Scalars({0.75, 0.43, gamma, 5, 6, 7, 8})
          .Tolerance(1e-6, 4e-3)
          .Run();
      test.Case("renoise")
          .InF32(small)
          .Missing()
          .Out(large)
          .Scalars({0.6, 0.7, gamma, 5, 6, 7, 4e9})
          .Tolerance(1e-6, 4e-3)
          .Run();
    }
    test.Case("renoise")
        .In(small)
        .In(large)
        .Out(large)
        .Scalars({0.75, 0.43, 0, 0, 0, 0, 0})
        .Tolerance(1e-6, 4e-3)
        .Run();
    test.Case("renoise")
        .Missing()
        .InF32(large)
        .Out(large)
        .Scalars({1, 2, 0, 0, 0, 0, 0})
        .Tolerance(0, 4e-3)
        .Run();
  }
  test.Case("renoise")
      .In({1, 2, 2})
      .Missing()
      .Out({1, 4, 4})
      .Scalars({1, 1, 0.5, 0, 0, 0, 0})
      .RunExpecting(PF_ERR_OPTION);
  test.Case("renoise")
      .In({1, 2, 2})
      .Missing()
      .Out({1, 4, 6})
      .Scalars({1, 1, 0.3, 0, 0, 0, 0})
      .RunExpecting(PF_ERR_SHAPE);
}
