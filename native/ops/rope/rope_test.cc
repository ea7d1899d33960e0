#include <cmath>

#include "core/op_test.h"

PF_CASES(rope) {
  const double eps = 1e-6;
  for (int64_t n : {1, 5, 70})
    for (int64_t h : {1, 3})
      for (int64_t d : {2, 6, 48, 64, 130}) {
        const op_test::Dims x = {n, h, d}, angles = {n, d / 2}, stats = {n, h};
        const auto cos = [](int64_t i) { return std::cos(0.7 * static_cast<double>(i)); };
        const auto sin = [](int64_t i) { return std::sin(0.7 * static_cast<double>(i)); };
        const auto with_angles = [&](op_test::Case& c) -> op_test::Case& {
          c.InF32(angles).InF32(angles);
          return c;
        };
        auto forward = test.Case("rope");
        forward.In(x).In({d});
        with_angles(forward).Out(x).OutF32(stats).Scalars({eps}).Tolerance(2e-6, 4e-3).Run();
        test.Case("rope")
            .In(x)
            .Missing()
            .InValues(angles, cos)
            .InValues(angles, sin)
            .Out(x)
            .OutMissing()
            .Scalars({eps})
            .Tolerance(2e-6, 4e-3)
            .F32Only()
            .Run();
        test.Case("rope")
            .In(x)
            .In({d})
            .Missing()
            .Missing()
            .Out(x)
            .OutF32(stats)
            .Scalars({eps})
            .Tolerance(2e-6, 4e-3)
            .Run();
        for (double accumulate : {0.0, 1.0}) {
          auto backward = test.Case("rope_backward");
          backward.In(x).In({d});
          with_angles(backward)
              .FromRef("rope", {0, 1, 2, 3}, {1e-3}, {x, stats}, 1)
              .In(x)
              .Out(x)
              .InOutF32({d})
              .Scalars({accumulate})
              .Tolerance(4e-6, 5e-3)
              .Run();
        }
        auto plain = test.Case("rope_backward");
        plain.In(x).Missing();
        with_angles(plain).Missing().In(x).Out(x).OutMissing().Scalars({0}).Tolerance(2e-6, 4e-3).Run();
      }
  // Head sizes up to the largest that threads keep whole, with more heads than one task has.
  for (int64_t d : {96, 128, 200}) {
    const op_test::Dims x = {11, 10, d}, angles = {11, d / 2}, stats = {11, 10};
    test.Case("rope")
        .In(x)
        .In({d})
        .InF32(angles)
        .InF32(angles)
        .Out(x)
        .OutF32(stats)
        .Scalars({eps})
        .Tolerance(2e-6, 4e-3)
        .Run();
    test.Case("rope_backward")
        .In(x)
        .InF32({d})
        .InF32(angles)
        .InF32(angles)
        .FromRef("rope", {0, 1, 2, 3}, {1e-3}, {x, stats}, 1)
        .In(x)
        .Out(x)
        .InOutF32({d})
        .Scalars({1})
        .Tolerance(4e-6, 5e-3)
        .Run();
  }
  // Without angles an odd head size is fine.
  test.Case("rope")
      .In({4, 2, 9})
      .In({9})
      .Missing()
      .Missing()
      .Out({4, 2, 9})
      .OutF32({4, 2})
      .Scalars({eps})
      .Tolerance(2e-6, 4e-3)
      .Run();
  test.Case("rope_backward")
      .In({40, 2, 19})
      .In({19})
      .Missing()
      .Missing()
      .FromRef("rope", {0, 1, -1, -1}, {1e-3}, {{40, 2, 19}, {40, 2}}, 1)
      .In({40, 2, 19})
      .Out({40, 2, 19})
      .OutMissing()
      .Scalars({0})
      .Tolerance(4e-6, 5e-3)
      .Run();

  test.Case("rope")
      .In({4, 2, 9})
      .Missing()
      .InF32({4, 4})
      .InF32({4, 4})
      .Out({4, 2, 9})
      .OutMissing()
      .Scalars({eps})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("rope")
      .In({4, 2, 8})
      .Missing()
      .InF32({4, 4})
      .Missing()
      .Out({4, 2, 8})
      .OutMissing()
      .Scalars({eps})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("rope")
      .In({4, 2, 8})
      .In({7})
      .Missing()
      .Missing()
      .Out({4, 2, 8})
      .OutF32({4, 2})
      .Scalars({eps})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("rope_backward")
      .In({4, 2, 8})
      .In({8})
      .Missing()
      .Missing()
      .Missing()
      .In({4, 2, 8})
      .Out({4, 2, 8})
      .InOutF32({8})
      .Scalars({0})
      .RunExpecting(PF_ERR_SHAPE);
}
