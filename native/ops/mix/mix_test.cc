#include "core/op_test.h"

PF_CASES(mix) {
  const int64_t sizes[][2] = {{1, 1}, {3, 5}, {2, 5000}, {4, 16000}};
  for (auto& s : sizes) {
    const op_test::Dims d{s[0], s[1]};
    test.Case("mix").In(d).In(d).InF32({s[0]}).Out(d).Tolerance(1e-6, 4e-3).Run();
    test.Case("mix").In(d).InF32(d).InF32({s[0]}).OutF32(d).Tolerance(1e-6, 1e-6).Run();
    test.Case("mix").In(d).Missing().InF32({s[0]}).Out(d).Tolerance(1e-6, 4e-3).Run();
    test.Case("mix").Missing().In(d).InF32({s[0]}).Out(d).Tolerance(1e-6, 4e-3).Run();
    test.Case("mix").Missing().Missing().InF32({s[0]}).Out(d).Tolerance(0, 0).Run();
  }
  test.Case("mix").In({2, 3}).In({2, 3}).InF32({3}).Out({2, 3}).RunExpecting(PF_ERR_SHAPE);
}
