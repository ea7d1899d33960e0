#include <cmath>

#include "core/op_test.h"

PF_CASES(downsample) {
  const int64_t sizes[][3] = {{1, 2, 2}, {3, 4, 6},    {2, 10, 70}, {1, 4, 4200}, {2, 5, 7},
                              {2, 3, 2}, {1, 2, 4201}, {3, 33, 40}, {1, 3, 3},    {40, 48, 80}};
  for (auto& s : sizes) {
    for (double scale : {1.0, 2.0}) {
      const op_test::Dims large{s[0], s[1], s[2]}, small{s[0], s[1] / 2, s[2] / 2};
      test.Case("downsample").In(large).Out(small).Scalars({scale}).Tolerance(1e-6, 4e-3).Run();
      test.Case("downsample").InF32(large).Out(small).Scalars({scale}).Tolerance(1e-6, 4e-3).Run();
      test.Case("downsample_backward").In(small).Out(large).Scalars({scale}).Tolerance(1e-6, 4e-3).Run();
      test.Case("downsample_backward").In(small).OutF32(large).Scalars({scale}).Tolerance(1e-6, 1e-6).Run();
    }
  }
  // Where one of many values is none, the others beside it are still rounded.
  const auto one_nan = [](int64_t i) { return i == 131 ? NAN : static_cast<double>(i % 13) - 6; };
  test.Case("downsample")
      .InValues({2, 4, 128}, one_nan)
      .Out({2, 2, 64})
      .Scalars({1})
      .Tolerance(1e-6, 4e-3)
      .Run();
  // Large results pass the caches by where rows are whole vectors: the second's are not at every level.
  for (int64_t w : {1024, 1048}) {
    const op_test::Dims large{17, 1024, w}, small{17, 512, w / 2};
    test.Case("downsample").In(large).Out(small).Scalars({2}).Tolerance(1e-6, 4e-3).Run();
  }
  test.Case("downsample").In({2, 1, 4}).Out({2, 0, 2}).Scalars({1}).RunExpecting(PF_ERR_SHAPE);
  test.Case("downsample").In({2, 4, 4}).Out({1, 2, 2}).Scalars({1}).RunExpecting(PF_ERR_SHAPE);
}
