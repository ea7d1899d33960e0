#include "core/op_test.h"

PF_CASES(reduce) {
  struct {
    int64_t outer, count, inner;
  } shapes[] = {{1, 1, 1},     {3, 5, 7},    {1, 4000, 24}, {1, 3, 70000},
                {2, 70000, 1}, {500, 33, 1}, {4, 2000, 3},  {2, 100, 600}};
  for (auto& s : shapes) {
    for (double accumulate : {0, 1}) {
      const std::vector<double> p{double(s.outer), double(s.count), double(s.inner), 0.5, accumulate};
      test.Case("sum")
          .In({s.outer, s.count, s.inner})
          .InOut({s.outer, s.inner})
          .Scalars(p)
          .Tolerance(2e-6, 4e-3)
          .Run();
      test.Case("sum")
          .In({s.outer, s.count, s.inner})
          .InOutF32({s.outer, s.inner})
          .Scalars(p)
          .Tolerance(2e-6, 2e-6)
          .Run();
    }
  }
  test.Case("sum").In({2, 0, 3}).InOut({2, 3}).Scalars({2, 0, 3, 1, 0}).Tolerance(0, 0).Run();
  test.Case("sum").In({6}).InOut({2}).Scalars({1, 3, 1, 1, 0}).RunExpecting(PF_ERR_SHAPE);
}
