#include "core/op_test.h"

PF_CASES(embedding) {
  for (int64_t n : {1, 9, 300})
    for (int64_t d : {1, 5, 64, 200}) {
      const auto index = [](int64_t i) { return i * i % 11; };
      test.Case("embedding").In({11, d}).InInt({n}, index).Out({n, d}).Tolerance(0, 0).Run();
      test.Case("embedding").In({11, d}).InInt({n}, index).OutF32({n, d}).Tolerance(0, 0).Run();
      test.Case("embedding").InF32({11, d}).InInt({1, n}, index).Out({1, n, d}).Tolerance(1e-7, 4e-3).Run();
      for (double accumulate : {0.0, 1.0})
        test.Case("embedding_backward")
            .InInt({n}, index)
            .In({n, d})
            .InOutF32({11, d})
            .Scalars({accumulate})
            .Tolerance(2e-6, 2e-6)
            .Run();
    }
  test.Case("embedding")
      .In({4, 8})
      .InInt({3}, [](int64_t i) { return i * 2; })
      .Out({3, 8})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("embedding")
      .In({4, 8})
      .InInt({3}, [](int64_t i) { return i - 1; })
      .Out({3, 8})
      .RunExpecting(PF_ERR_SHAPE);
  test.Case("embedding").In({4, 8}).In({3}).Out({3, 8}).RunExpecting(PF_ERR_DTYPE);
  test.Case("embedding_backward")
      .InInt({3}, [](int64_t) { return 4; })
      .In({3, 8})
      .InOutF32({4, 8})
      .Scalars({0})
      .RunExpecting(PF_ERR_SHAPE);
}
