#include "core/op_test.h"

PF_CASES(pointwise) {
  for (int kind = 0; kind <= 9; ++kind) {
    for (int64_t n : {1, 15, 64, 2500, 70001}) {
      // sqrt needs positive input, and its slope needs it away from 0
      auto x = [kind](int64_t i) { return kind == 5 ? 0.1 + i % 97 : (i % 211 - 105) * 0.07; };
      auto g = [](int64_t i) { return 0.01 * (i % 37) - 0.2; };
      test.Case("unary")
          .InValues({n}, x)
          .Out({n})
          .Scalars({double(kind), -1.5, 2})
          .Tolerance(1e-5, 4e-3)
          .Run();
      test.Case("unary_backward")
          .InValues({n}, x)
          .InValues({n}, g)
          .Out({n})
          .Scalars({double(kind), -1.5, 2})
          .Tolerance(1e-5, 4e-3)
          .Run();
    }
  }
  test.Case("unary")
      .InValues({4}, [](int64_t i) { return i < 2 ? i * 2e20 - 1e20 : 0; })
      .Out({4})
      .Scalars({1, 0, 0})
      .Run();
  test.Case("unary_backward")
      .InValues({3}, [](int64_t i) { return (i - 1) * 1e20; })
      .InF32({3})
      .Out({3})
      .Scalars({1, 0, 0})
      .Run();
  test.Case("unary").In({3}).Out({3}).Scalars({17, 0, 0}).RunExpecting(PF_ERR_OPTION);

  using op_test::Dims;
  struct {
    Dims a, b;
  } shapes[] = {{{5}, {5}},
                {{3, 5}, {5}},
                {{3, 5}, {3, 1}},
                {{3, 5}, {1}},
                {{4, 1, 6}, {4, 1, 1}},
                {{2, 3, 4, 5, 6}, {1, 3, 1, 5, 1}},
                {{2, 3, 40, 50}, {3, 1, 50}},
                {{2, 5000}, {5000}},
                {{2, 1, 5000}, {2, 1, 1}},
                {{300, 300}, {300, 300}}};
  for (auto& s : shapes) {
    for (int kind = 0; kind < 4; ++kind) {
      auto b = [](int64_t i) { return i % 7 + 0.5; };
      test.Case("binary")
          .In(s.a)
          .InValues(s.b, b)
          .Out(s.a)
          .Scalars({double(kind)})
          .Tolerance(1e-6, 4e-3)
          .Run();
      test.Case("binary")
          .In(s.a)
          .InF32(s.b, 0.5)
          .OutF32(s.a)
          .Scalars({double(kind % 3)})
          .Tolerance(1e-6, 1e-6)
          .Run();
    }
  }
  test.Case("binary").In({3, 5}).In({3}).Out({3, 5}).Scalars({0}).RunExpecting(PF_ERR_SHAPE);

  for (int64_t n : {1, 33, 5000, 40000}) {
    test.Case("axpby").In({n}).In({n}).Out({n}).Scalars({0.5, -2, 0.25}).Tolerance(1e-6, 4e-3).Run();
    test.Case("axpby").In({n}).InF32({n}).Out({n}).Scalars({0.5, -2, 0.25}).Tolerance(1e-6, 4e-3).Run();
    test.Case("axpby").InF32({n}).Missing().Out({n}).Scalars({-1, 3, 2}).Tolerance(1e-6, 4e-3).Run();
  }

  for (int64_t d : {1, 24, 130, 2500}) {
    auto rows = [](int64_t i) { return (i / 9) % 3; };
    for (int64_t n : {1, 40}) {
      test.Case("gated_add")
          .In({n, d})
          .In({n, d})
          .In({3, d})
          .InInt({n}, rows)
          .Out({n, d})
          .Tolerance(1e-6, 4e-3)
          .Run();
      test.Case("gated_add")
          .In({n, d})
          .InF32({n, d})
          .In({3, d})
          .InInt({n}, rows)
          .OutF32({n, d})
          .Tolerance(1e-6, 1e-6)
          .Run();
      test.Case("gated_add_backward")
          .In({n, d})
          .In({n, d})
          .In({3, d})
          .InInt({n}, rows)
          .Out({n, d})
          .Out({3, d})
          .Tolerance(2e-6, 4e-3)
          .Run();
      test.Case("gated_add_backward")
          .In({n, d})
          .InF32({n, d})
          .In({3, d})
          .InInt({n}, rows)
          .OutMissing()
          .OutF32({3, d})
          .Tolerance(2e-6, 2e-6)
          .Run();
    }
  }
  test.Case("gated_add_backward")
      .In({900, 70})
      .In({900, 70})
      .In({2, 70})
      .InInt({900}, [](int64_t i) { return i & 1; })
      .Out({900, 70})
      .Out({2, 70})
      .Tolerance(4e-6, 4e-3)
      .Run();
  test.Case("gated_add")
      .In({2, 8})
      .In({2, 8})
      .In({1, 8})
      .InInt({2}, [](int64_t i) { return i; })
      .Out({2, 8})
      .RunExpecting(PF_ERR_SHAPE);
}
