#include <cmath>

#include "core/op_test.h"

PF_CASES(group_norm) {
  struct Shape {
    int64_t f, p, c;
    double g;
  };
  for (const Shape& s : {Shape{1, 1, 4, 2},
                         {2, 9, 6, 3},
                         {3, 35, 64, 32},
                         {1, 300, 128, 32},
                         {2, 77, 34, 2},
                         {1, 7, 1920, 32},
                         {2, 5, 2304, 32}})
    for (double silu : {0.0, 1.0}) {
      const int64_t g = static_cast<int64_t>(s.g);
      const op_test::Dims x = {s.f, s.p, s.c}, stats = {s.f, g};
      test.Case("group_norm")
          .In(x)
          .In({s.c})
          .In({s.c})
          .Out(x)
          .OutF32(stats)
          .OutF32(stats)
          .Scalars({s.g, 1e-6, silu})
          .Tolerance(2e-6, 4e-3)
          .Run();
      for (double accumulate : {0.0, 1.0})
        test.Case("group_norm_backward")
            .In(x)
            .In({s.c})
            .In({s.c})
            .FromRef("group_norm", {0, 1, 2}, {s.g, 0.5, silu}, {x, stats, stats}, 1)
            .FromRef("group_norm", {0, 1, 2}, {s.g, 0.5, silu}, {x, stats, stats}, 2)
            .In(x)
            .Out(x)
            .InOutF32({s.c})
            .InOutF32({s.c})
            .Scalars({s.g, silu, accumulate})
            .Tolerance(4e-6, 5e-3)
            .Run();
    }
  // Many pixels: statistics and gradients of a channel are joined from many parts.
  const op_test::Dims many = {1, 20000, 8}, of_many = {1, 2};
  const auto wave = [](int64_t i) { return 0.5 + std::sin(0.37 * static_cast<double>(i)); };
  test.Case("group_norm")
      .InValues(many, wave)
      .In({8})
      .In({8})
      .Out(many)
      .OutF32(of_many)
      .OutF32(of_many)
      .Scalars({2, 1e-6, 0})
      .Tolerance(2e-6, 4e-3)
      .Run();
  test.Case("group_norm_backward")
      .InValues(many, wave)
      .In({8})
      .In({8})
      .FromRef("group_norm", {0, 1, 2}, {2, 0.5, 1}, {many, of_many, of_many}, 1)
      .FromRef("group_norm", {0, 1, 2}, {2, 0.5, 1}, {many, of_many, of_many}, 2)
      .In(many)
      .Out(many)
      .OutF32({8})
      .OutF32({8})
      .Scalars({2, 1, 0})
      .Tolerance(4e-6, 5e-3)
      .Run();
  // Far from zero: the variance must not drown in the square of the mean.
  test.Case("group_norm")
      .InValues({1, 500, 64}, [](int64_t i) { return 4096 + i * 7 % 13; })
      .In({64})
      .In({64})
      .Out({1, 500, 64})
      .OutF32({1, 4})
      .OutF32({1, 4})
      .Scalars({4, 1e-6, 0})
      .Tolerance(1e-4, 4e-3)
      .F32Only()
      .Run();
  test.Case("group_norm")
      .In({1, 20, 8})
      .In({8})
      .In({8})
      .Out({1, 20, 8})
      .OutMissing()
      .OutMissing()
      .Scalars({2, 1e-6, 1})
      .Tolerance(2e-6, 4e-3)
      .Run();

  test.Case("group_norm")
      .In({2, 3, 6})
      .In({6})
      .In({6})
      .Out({2, 3, 6})
      .OutF32({2, 4})
      .OutF32({2, 4})
      .Scalars({4, 1e-6, 0})
      .RunExpecting(PF_ERR_OPTION);
  test.Case("group_norm")
      .In({6, 6})
      .In({6})
      .In({6})
      .Out({6, 6})
      .OutF32({6, 2})
      .OutF32({6, 2})
      .Scalars({2, 1e-6, 0})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("group_norm")
      .In({2, 3, 6})
      .In({5})
      .In({6})
      .Out({2, 3, 6})
      .OutF32({2, 2})
      .OutF32({2, 2})
      .Scalars({2, 1e-6, 0})
      .RunExpecting(PF_ERR_SHAPE);
}
