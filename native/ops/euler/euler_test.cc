#include "core/op_test.h"

PF_CASES(euler) {
  for (int64_t n : {1, 33, 5000, 70001}) {
    test.Case("euler").In({n}).In({n}).In({n}).Out({n}).Scalars({-0.05, 7}).Tolerance(1e-6, 4e-3).Run();
    test.Case("euler").In({n}).In({n}).Missing().Out({n}).Scalars({-0.05, 7}).Tolerance(1e-6, 4e-3).Run();
    test.Case("euler").InF32({n}).In({n}).In({n}).OutF32({n}).Scalars({-0.05, 7}).Tolerance(1e-6, 1e-6).Run();
  }
  test.Case("euler").In({3}).In({4}).Missing().Out({3}).Scalars({1, 1}).RunExpecting(PF_ERR_SHAPE);
}
