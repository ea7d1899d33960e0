#include <cmath>

#include "core/op_test.h"

// The runner's dtypes are f32, bf16, i32 and u8; f16, i64 and f64 are cast in the tensor tests.
PF_CASES(cast) {
  auto wide = [](int64_t i) { return (i % 1001 - 500) * (i % 7 == 0 ? 1e8 : 1.37); };
  for (int64_t n : {1, 31, 70001}) {
    test.Case("cast").In({n}).OutF32({n}).Tolerance(0, 0).Run();
    test.Case("cast").InF32({n}).Out({n}).Tolerance(0, 4e-3).Run();
    test.Case("cast").InValues({n}, wide).OutInt({n}).Tolerance(0, 0).Run();
    test.Case("cast").InValues({n}, wide).OutU8({n}).Tolerance(0, 0).Run();
    test.Case("cast")
        .InInt({n}, [](int64_t i) { return i * 30001 - 7; })
        .Out({n})
        .Tolerance(1e-7, 4e-3)
        .Run();
    test.Case("cast").InInt({n}, [](int64_t i) { return i - 40; }).OutU8({n}).Tolerance(0, 0).Run();
    test.Case("cast").InU8({n}, [](int64_t i) { return i % 256; }).Out({n}).Tolerance(0, 4e-3).Run();
    test.Case("cast").InU8({n}, [](int64_t i) { return i % 256; }).OutInt({n}).Tolerance(0, 0).Run();
  }
  const double special[] = {NAN, INFINITY, -INFINITY, 0.0, -0.9, 255.9, 1e30, -1e30};
  auto odd = [special](int64_t i) { return special[i % 8]; };
  test.Case("cast").InValues({8}, odd).OutInt({8}).Tolerance(0, 0).Run();
  test.Case("cast").InValues({8}, odd).OutU8({8}).Tolerance(0, 0).Run();
  test.Case("cast").InValues({8}, odd).OutF32({8}).Tolerance(0, 0).Run();
}
