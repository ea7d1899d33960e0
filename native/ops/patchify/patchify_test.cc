#include "core/op_test.h"

PF_CASES(patchify) {
  struct {
    int64_t b, c, t, h, w, offset, stride, n;
  } shapes[] = {{1, 1, 1, 2, 2, 0, 0, 1},
                {2, 3, 2, 4, 6, 5, 20, 40},
                {1, 16, 3, 24, 40, 0, 0, 720},
                {2, 16, 1, 6, 10, 0, 15, 30},
                {1, 20, 2, 4, 70, 3, 0, 145}};
  for (auto& s : shapes) {
    const op_test::Dims latent{s.b, s.c, s.t, s.h, s.w}, rows{s.n, 4 * s.c};
    const std::vector<double> p{double(s.offset), double(s.stride)};
    test.Case("patchify").In(latent).InOut(rows).Scalars(p).Tolerance(0, 0).Run();
    test.Case("patchify").InF32(latent).InOut(rows).Scalars(p).Tolerance(0, 4e-3).Run();
    test.Case("unpatchify").In(rows).Out(latent).Scalars(p).Tolerance(0, 0).Run();
    test.Case("unpatchify").In(rows).OutF32(latent).Scalars(p).Tolerance(0, 0).Run();
  }
  test.Case("patchify").In({1, 2, 1, 2, 3}).InOut({1, 8}).Scalars({0, 0}).RunExpecting(PF_ERR_SHAPE);
  test.Case("patchify").In({2, 2, 1, 2, 2}).InOut({2, 8}).Scalars({0, 2}).RunExpecting(PF_ERR_SHAPE);
}
