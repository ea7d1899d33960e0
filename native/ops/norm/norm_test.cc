#include "core/op_test.h"

PF_CASES(norm) {
  for (int64_t d : {1, 7, 64, 130, 1536})
    for (int64_t n : {1, 5, 70}) {
      test.Case("norm_modulate").In({n, d}).Missing().Missing().Missing().Out({n, d}).OutF32({n}).OutF32({n})
          .Scalars({1e-6}).Tolerance(2e-6, 4e-3).Run();
      const auto row = [](int64_t i) { return i / 3 % 2; };
      test.Case("norm_modulate").In({n, d}).In({2, d}).In({2, d}).InInt({n}, row)
          .Out({n, d}).OutF32({n}).OutF32({n}).Scalars({1e-6}).Tolerance(2e-6, 4e-3).Run();
      test.Case("norm_modulate_backward").In({n, d})
          .FromRef("norm_modulate", {0, -1, -1, -1}, {0.5}, {{n, d}, {n}, {n}}, 1)
          .FromRef("norm_modulate", {0, -1, -1, -1}, {0.5}, {{n, d}, {n}, {n}}, 2)
          .In({2, d}).InInt({n}, row).In({n, d}).Out({n, d}).Out({2, d}).Out({2, d})
          .Tolerance(4e-6, 5e-3).Run();
      test.Case("norm_modulate_backward").In({n, d})
          .FromRef("norm_modulate", {0, -1, -1, -1}, {0.5}, {{n, d}, {n}, {n}}, 1)
          .FromRef("norm_modulate", {0, -1, -1, -1}, {0.5}, {{n, d}, {n}, {n}}, 2)
          .Missing().Missing().In({n, d}).Out({n, d}).OutMissing().OutMissing().Tolerance(4e-6, 5e-3).Run();
      test.Case("rms_norm").In({n, d}).In({d}).Out({n, d}).OutF32({n}).Scalars({1e-6}).Tolerance(2e-6, 4e-3).Run();
      for (double accumulate : {0.0, 1.0})
        test.Case("rms_norm_backward").In({n, d}).In({d}).FromRef("rms_norm", {0, 1}, {0.5}, {{n, d}, {n}}, 1)
            .In({n, d}).Out({n, d}).InOutF32({d}).Scalars({accumulate}).Tolerance(4e-6, 5e-3).Run();
    }
  // One entry for all rows needs no index; the statistics may be left out.
  test.Case("norm_modulate").In({2, 9, 40}).In({1, 40}).In({1, 40}).Missing().Out({2, 9, 40}).OutMissing()
      .OutMissing().Scalars({1e-5}).Tolerance(2e-6, 4e-3).Run();
  test.Case("norm_modulate").InValues({3, 65}, [](int64_t i) { return 1000 + i % 65 % 7; }).In({1, 65}).Missing()
      .Missing().Out({3, 65}).OutF32({3}).OutF32({3}).Scalars({1e-6}).Tolerance(1e-4, 4e-3).Run();
  test.Case("norm_modulate_backward").In({200, 72})
      .FromRef("norm_modulate", {0, -1, -1, -1}, {0.5}, {{200, 72}, {200}, {200}}, 1)
      .FromRef("norm_modulate", {0, -1, -1, -1}, {0.5}, {{200, 72}, {200}, {200}}, 2)
      .In({1, 72}).Missing().In({200, 72}).Out({200, 72}).OutF32({1, 72}).OutF32({1, 72})
      .Tolerance(4e-6, 5e-3).Run();

  test.Case("norm_modulate").In({4, 8}).In({2, 8}).In({2, 8}).InInt({4}, [](int64_t i) { return i; })
      .Out({4, 8}).OutF32({4}).OutF32({4}).Scalars({1e-6}).RunExpecting(PF_ERR_SHAPE);
  test.Case("norm_modulate").In({4, 8}).In({2, 8}).In({2, 8}).Missing().Out({4, 8}).OutF32({4}).OutF32({4})
      .Scalars({1e-6}).RunExpecting(PF_ERR_SHAPE);
  test.Case("norm_modulate").In({4, 8}).In({1, 7}).Missing().Missing().Out({4, 8}).OutF32({4}).OutF32({4})
      .Scalars({1e-6}).RunExpecting(PF_ERR_SHAPE);
  test.Case("rms_norm").In({4, 8}).In({7}).Out({4, 8}).OutF32({4}).Scalars({1e-6}).RunExpecting(PF_ERR_SHAPE);
  test.Case("rms_norm").InInt({4, 8}, [](int64_t i) { return i; }).In({8}).Out({4, 8}).OutF32({4}).Scalars({1e-6})
      .RunExpecting(PF_ERR_DTYPE);
}
