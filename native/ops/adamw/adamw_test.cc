#include <cmath>

#include "core/op_test.h"

PF_CASES(adamw) {
  // The runner's v is signed; gradients of size 10 make the new v positive nearly everywhere, and with beta2
  // = 0 it does not depend on the old one at all. Where it stays negative both sides agree on NaN.
  const std::vector<double> usual{1e-3, 0.9, 0.95, 1e-8, 0.1, 0.19, 0.0975},
      first{0.5, 0.9, 0, 1e-6, 0.01, 0.1, 1};
  for (int64_t n : {1, 31, 2049, 70001}) {
    for (auto& p : {usual, first}) {
      test.Case("adamw")
          .InF32({n}, 10)
          .InF32({2})
          .InOutF32({n})
          .InOutF32({n})
          .InOutF32({n})
          .Out({n})
          .Scalars(p)
          .Tolerance(2e-5, 4e-3)
          .Run();
      test.Case("adamw")
          .InF32({n}, 10)
          .Missing()
          .InOutF32({n})
          .InOutF32({n})
          .InOutF32({n})
          .OutMissing()
          .Scalars(p)
          .Tolerance(2e-5, 2e-5)
          .Run();
    }
    for (double clip : {double(NAN), double(INFINITY), 0.25}) {
      auto coefficient = [clip](int64_t i) { return i ? clip : 3.0; };
      test.Case("adamw")
          .InF32({n}, 10)
          .InValues({2}, coefficient)
          .InOutF32({n})
          .InOutF32({n})
          .InOutF32({n})
          .InOut({n})
          .Scalars(first)
          .Tolerance(2e-5, 2e-5)
          .F32Only()
          .Run();
    }
  }
  test.Case("adamw")
      .InF32({4})
      .Missing()
      .InOutF32({4})
      .InOutF32({3})
      .InOutF32({4})
      .OutMissing()
      .Scalars(usual)
      .RunExpecting(PF_ERR_SHAPE);
}
