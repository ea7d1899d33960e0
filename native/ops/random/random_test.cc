#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "core/op_test.h"
#include "core/philox.h"

namespace {

// A statement about philox.h itself, which every kernel reproduces bit by bit in the cases below.
void Expect(bool holds, const char* what, double value) {
  if (holds) return;
  std::printf("FAIL random: %s: %.9g\n", what, value);
  std::exit(1);
}

void KnownAnswers() {
  struct {
    uint32_t counter, k0, k1, words[4];
  } known[] = {{0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
               {0xffffffff, 0xffffffff, 0xffffffff, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}};
  for (auto& k : known) {
    uint32_t c[4] = {k.counter, k.counter, k.counter, k.counter};
    PhiloxRounds<ScalarLanes>(c, k.k0, k.k1);
    for (int i = 0; i < 4; ++i) Expect(c[i] == k.words[i], "published Philox4x32-10 words", c[i]);
  }
}

// The polynomials against the maths library.
void Accuracy() {
  for (uint64_t w = 0; w < 0x100000000ull; w += 7919 * 13) {
    const uint32_t word = static_cast<uint32_t>(w);
    const double u = static_cast<float>(static_cast<float>(word >> 1) * 0x1p-31f + 0x1p-32f);
    const double radius = std::sqrt(-2 * std::log(u));
    Expect(std::fabs(NormalRadius<ScalarLanes>(word) - radius) < 1e-6 * (1 + radius), "radius", u);
    float z0, z1;
    NormalPair<ScalarLanes>(0x40000000, word, &z0, &z1);
    const double angle = 6.283185307179586 * word / 4294967296.0, r = NormalRadius<ScalarLanes>(0x40000000);
    Expect(std::fabs(z0 - r * std::cos(angle)) < 1e-6, "cosine", angle);
    Expect(std::fabs(z1 - r * std::sin(angle)) < 1e-6, "sine", angle);
  }
  Expect(NormalRadius<ScalarLanes>(0xffffffff) == 0, "radius of u = 1",
         NormalRadius<ScalarLanes>(0xffffffff));
}

// 2^21 samples: mean, variance, fourth moment, neighbours and streams within four standard errors.
void Moments() {
  const PhiloxKey key{12345, 6, 7, 8}, other{12345, 6, 8, 8};
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, neighbour = 0, stream = 0, mean = 0, square = 0, last = 0;
  const int64_t n = 1 << 21;
  for (int64_t block = 0; block < n / 4; ++block) {
    float z[4], y[4];
    PhiloxNormals(key, block, z);
    PhiloxNormals(other, block, y);
    for (int i = 0; i < 4; ++i) {
      const double x = z[i], u = PhiloxUniformAt(key, 4 * block + i);
      m1 += x, m2 += x * x, m3 += x * x * x, m4 += x * x * x * x;
      neighbour += x * last, stream += x * y[i], last = x;
      mean += u, square += u * u;
      Expect(u >= 0 && u < 1, "uniform in [0, 1)", u);
    }
  }
  const double sigma = 4 / std::sqrt(static_cast<double>(n));
  Expect(std::fabs(m1 / n) < sigma, "normal mean", m1 / n);
  Expect(std::fabs(m2 / n - 1) < sigma * std::sqrt(2.0), "normal variance", m2 / n);
  Expect(std::fabs(m3 / n) < sigma * std::sqrt(15.0), "normal skewness", m3 / n);
  Expect(std::fabs(m4 / n - 3) < sigma * std::sqrt(96.0), "normal kurtosis", m4 / n);
  Expect(std::fabs(neighbour / n) < sigma, "correlation of neighbours", neighbour / n);
  Expect(std::fabs(stream / n) < sigma, "correlation of streams", stream / n);
  Expect(std::fabs(mean / n - 0.5) < sigma * std::sqrt(1 / 12.0), "uniform mean", mean / n);
  Expect(std::fabs(square / n - 1 / 3.0) < sigma * std::sqrt(4 / 45.0), "uniform square", square / n);
}

}  // namespace

PF_CASES(random) {
  KnownAnswers();
  Accuracy();
  Moments();
  // Equal bits of vectors and threads with the scalar loop of the reference.
  for (int64_t n : {1, 3, 4, 63, 64, 65, 2049, 300001}) {
    test.Case("random_normal").Out({n}).Scalars({0, 1, 42, 0, 1, 2}).Tolerance(0, 4e-3).Run();
    test.Case("random_normal")
        .Out({n})
        .Scalars({0.5, 2.5, 4294967295, 4294967295, 4294967295, 77})
        .Tolerance(0, 4e-3)
        .Run();
    test.Case("random_uniform").Out({n}).Scalars({0, 1, 42, 0, 1, 2}).Tolerance(0, 4e-3).Run();
    test.Case("random_uniform").Out({n}).Scalars({-3, 5, 9, 8, 7, 6}).Tolerance(0, 4e-3).Run();
    test.Case("random_uniform")
        .Out({n})
        .Scalars({1, 1.0000001192092896, 9, 8, 7, 6})
        .Tolerance(0, 4e-3)
        .Run();
  }
}
