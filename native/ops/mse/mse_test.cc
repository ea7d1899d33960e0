#include "core/op_test.h"

PF_CASES(mse) {
  const int64_t sizes[][2] = {{1, 1}, {3, 17}, {2, 5000}, {1, 100003}, {500, 3}};
  for (auto& s : sizes) {
    const op_test::Dims d{s[0], s[1]};
    test.Case("mse").In(d).In(d).OutF32({s[0]}).Tolerance(1e-6, 1e-6).Run();
    test.Case("mse").In(d).InF32(d).OutF32({s[0]}).Tolerance(1e-6, 1e-6).Run();
    test.Case("mse_backward").In(d).In(d).InF32({s[0]}).Out(d).Tolerance(1e-6, 4e-3).Run();
    test.Case("mse_backward").In(d).InF32(d).InF32({s[0]}).OutF32(d).Tolerance(1e-6, 1e-6).Run();
  }
  test.Case("mse").In({2, 3}).In({2, 4}).OutF32({2}).RunExpecting(PF_ERR_SHAPE);
}
