#include "core/op_test.h"

PF_CASES(upsample) {
  const int64_t sizes[][3] = {{1, 1, 1}, {3, 2, 3}, {2, 5, 35}, {1, 2, 2101}, {40, 24, 40}};
  for (auto& s : sizes) {
    const op_test::Dims small{s[0], s[1], s[2]}, large{s[0], 2 * s[1], 2 * s[2]};
    test.Case("upsample").In(small).Out(large).Tolerance(0, 0).Run();
    test.Case("upsample").InF32(small).Out(large).Tolerance(0, 4e-3).Run();
    test.Case("upsample_backward").In(large).Out(small).Scalars({1}).Tolerance(1e-6, 4e-3).Run();
    test.Case("upsample_backward").In(large).OutF32(small).Scalars({0.25}).Tolerance(1e-6, 1e-6).Run();
  }
  // Large results pass the caches by where rows are whole vectors: the second's are not at every level.
  for (auto& s : {op_test::Dims{24, 512, 512}, op_test::Dims{24, 512, 516}})
    test.Case("upsample").In(s).Out({s[0], 2 * s[1], 2 * s[2]}).Tolerance(0, 0).Run();
  test.Case("upsample").In({2, 2, 2}).Out({2, 4, 5}).RunExpecting(PF_ERR_SHAPE);
}
