#include <cmath>

#include "core/op_test.h"

PF_CASES(frames) {
  const int64_t sizes[][4] = {{1, 1, 1, 1}, {2, 2, 3, 5}, {1, 3, 64, 120}};
  for (auto& s : sizes) {
    const op_test::Dims planes{s[0], 3, s[1], s[2], s[3]}, bytes{s[0], s[1], s[2], s[3], 3};
    // Steps of 2^-7 stay clear of rounding; normals check the clamp, where one count in many may differ.
    test.Case("frames_encode")
        .InValues(planes, [](int64_t i) { return (i * 37 % 301 - 150) / 128.0; })
        .OutU8(bytes)
        .Tolerance(0, 0)
        .Run();
    test.Case("frames_encode").In(planes, 0.7).OutU8(bytes).Tolerance(1e-3, 1e-3).Run();
    test.Case("frames_decode")
        .InU8(bytes, [](int64_t i) { return i * 7 % 256; })
        .Out(planes)
        .Tolerance(1e-6, 4e-3)
        .Run();
  }
  const double special[] = {NAN, INFINITY, -INFINITY, 1, -1, 0, 1e30, -1e30, 0.5};
  test.Case("frames_encode")
      .InValues({1, 3, 1, 1, 3}, [special](int64_t i) { return special[i]; })
      .OutU8({1, 1, 1, 3, 3})
      .Tolerance(0, 0)
      .Run();
  test.Case("frames_encode").In({1, 4, 1, 1, 1}).OutU8({1, 1, 1, 1, 4}).RunExpecting(PF_ERR_SHAPE);
}
