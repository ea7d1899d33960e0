#include <cmath>

#include "core/op_test.h"

PF_CASES(grad_norm) {
  for (int64_t n : {0, 1, 33, 5000, 100003}) {
    for (double max_norm : {0.0, 1.0, 1e9})
      test.Case("grad_norm").InF32({n}).OutF32({2}).Scalars({max_norm}).Tolerance(1e-6, 1e-6).Run();
  }
  test.Case("grad_norm")
      .InValues({70}, [](int64_t i) { return i == 40 ? NAN : i; })
      .OutF32({2})
      .Scalars({1})
      .Run();
  test.Case("grad_norm")
      .InValues({70}, [](int64_t i) { return i == 69 ? INFINITY : i; })
      .OutF32({2})
      .Scalars({0})
      .Run();
  test.Case("grad_norm").InValues({70}, [](int64_t) { return 1e30; }).OutF32({2}).Scalars({1}).Run();
  test.Case("grad_norm").InF32({4}).OutF32({3}).Scalars({1}).RunExpecting(PF_ERR_SHAPE);
}
