#include "core/op_test.h"
#include "ops/matmul/direct_calls.h"

namespace {

struct Shape {
  int64_t b, t, h, w, c_in, c_out;
  int64_t kernel[3], stride[3], pad[3];
};

void AllThree(op_test::Test& test, const Shape& s, bool bias) {
  const int64_t in[3] = {s.t, s.h, s.w};
  int64_t out[3];
  for (int i = 0; i < 3; ++i) out[i] = (in[i] + s.pad[i] * (i ? 2 : 1) - s.kernel[i]) / s.stride[i] + 1;
  const op_test::Dims x = {s.b, s.t, s.h, s.w, s.c_in}, y = {s.b, out[0], out[1], out[2], s.c_out};
  const op_test::Dims w = {s.c_out, s.c_in, s.kernel[0], s.kernel[1], s.kernel[2]};
  std::vector<double> scalars;
  for (int64_t v : s.stride) scalars.push_back(v);
  for (int64_t v : s.pad) scalars.push_back(v);

  auto forward = test.Case("conv3d").In(x).In(w);
  (bias ? forward.In({s.c_out}) : forward.Missing()).Out(y).Scalars(scalars).Tolerance(3e-6, 6e-3).Run();
  test.Case("conv3d_backward_data").In(y).In(w).Out(x).Scalars(scalars).Tolerance(3e-6, 6e-3).Run();
  for (int accumulate = 0; accumulate <= 1; ++accumulate) {
    auto with = scalars;
    with.push_back(accumulate);
    auto grad = test.Case("conv3d_backward_weights").In(x).In(y);
    accumulate ? grad.InOutF32(w) : grad.OutF32(w);
    if (!bias)
      grad.OutMissing();
    else
      accumulate ? grad.InOutF32({s.c_out}) : grad.OutF32({s.c_out});
    grad.Scalars(with).Tolerance(3e-6, 3e-6).Run();
  }
}

// Forward, data and weights at a size that is cut into several tiles and parts.
void SameBits(const PfBackendTable* table, bool bf16) {
  const int32_t type = bf16 ? PF_BF16 : PF_F32;
  const op_test::Dims x = {2, 5, 20, 24, 16}, w = {24, 16, 3, 3, 3}, y = {2, 5, 20, 24, 24};
  const int64_t xs = 2 * 5 * 20 * 24 * 16, ws = 24 * 16 * 27, ys = xs / 16 * 24;
  auto x_data = Values(type, xs, 1), w_data = Values(type, ws, 2), dy_data = Values(type, ys, 3);
  const PfView x_view = View(x_data.data(), type, x), w_view = View(w_data.data(), type, w);
  const PfView dy_view = View(dy_data.data(), type, y), none = View(nullptr, type, {});
  SameBitsOnAnyThreads(table, "conv3d", {ys, xs, ws, 24}, [&](const std::vector<float*>& out) {
    Call(table, PF_OP_conv3d, {x_view, w_view, none}, {View(out[0], PF_F32, y)}, {1, 1, 1, 2, 1, 1});
    Call(table, PF_OP_conv3d_backward_data, {dy_view, w_view}, {View(out[1], PF_F32, x)}, {1, 1, 1, 2, 1, 1});
    Call(table, PF_OP_conv3d_backward_weights, {x_view, dy_view},
         {View(out[2], PF_F32, w), View(out[3], PF_F32, {24})}, {1, 1, 1, 2, 1, 1, 0});
  });
}

}  // namespace

PF_CASES(conv3d) {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 1, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}},
      {2, 3, 5, 7, 3, 8, {3, 3, 3}, {1, 1, 1}, {2, 1, 1}},
      {1, 4, 6, 5, 8, 3, {3, 3, 3}, {1, 1, 1}, {2, 1, 1}},
      {2, 1, 9, 9, 4, 16, {3, 3, 3}, {1, 1, 1}, {2, 1, 1}},
      {1, 5, 8, 8, 16, 16, {3, 3, 3}, {1, 2, 2}, {2, 1, 1}},
      {1, 5, 9, 7, 16, 20, {3, 3, 3}, {1, 2, 2}, {2, 1, 1}},
      {2, 7, 6, 6, 16, 32, {3, 3, 3}, {2, 1, 1}, {2, 1, 1}},
      {1, 6, 8, 8, 5, 7, {3, 3, 3}, {2, 2, 2}, {2, 0, 0}},
      {2, 3, 8, 8, 32, 64, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}},
      {1, 3, 5, 5, 13, 7, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}},
      {1, 3, 8, 6, 16, 16, {1, 1, 1}, {1, 2, 2}, {0, 0, 0}},
      {1, 5, 6, 6, 12, 12, {3, 1, 1}, {1, 1, 1}, {2, 0, 0}},
      {1, 2, 9, 8, 4, 6, {1, 4, 2}, {1, 2, 1}, {0, 1, 1}},
      {3, 2, 6, 6, 17, 33, {2, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {2, 2, 16, 16, 32, 32, {3, 3, 3}, {1, 1, 1}, {2, 1, 1}},
      // Enough of both sides for the largest tiles.
      {1, 2, 16, 24, 8, 72, {2, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {1, 2, 16, 24, 72, 8, {2, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      // Strides that skip inputs: some have no gradient.
      {1, 5, 7, 9, 6, 10, {1, 2, 2}, {2, 3, 3}, {0, 1, 1}},
  };
  bool bias = true;
  for (const Shape& s : shapes) AllThree(test, s, bias), bias = !bias;
  // A frame heavy enough that its rows are split, with a stride across the split.
  test.Case("conv3d")
      .In({1, 2, 16, 28, 64})
      .In({64, 64, 2, 3, 3})
      .In({64})
      .Out({1, 2, 16, 28, 64})
      .Scalars({1, 1, 1, 1, 1, 1})
      .Tolerance(3e-6, 6e-3)
      .Run();
  test.Case("conv3d_backward_data")
      .In({1, 2, 11, 21, 128})
      .In({128, 64, 2, 3, 3})
      .Out({1, 2, 21, 42, 64})
      .Scalars({1, 2, 2, 1, 1, 1})
      .Tolerance(3e-6, 6e-3)
      .Run();

  EveryBackend([](const PfBackendTable* table) {
    for (int bf16 = 0; bf16 < 2; ++bf16) SameBits(table, bf16);
  });

  test.Case("conv3d")
      .In({1, 3, 5, 5, 3})
      .In({4, 5, 3, 3, 3})
      .Missing()
      .Out({1, 3, 5, 5, 4})
      .Scalars({1, 1, 1, 2, 1, 1})
      .RunExpecting(1);
  test.Case("conv3d")
      .In({1, 3, 5, 5, 3})
      .In({4, 3, 3, 3, 3})
      .Missing()
      .Out({1, 3, 5, 4, 4})
      .Scalars({1, 1, 1, 2, 1, 1})
      .RunExpecting(1);
  test.Case("conv3d")
      .In({1, 3, 5, 5, 3})
      .In({4, 3, 3, 3, 3})
      .In({3})
      .Out({1, 3, 5, 5, 4})
      .Scalars({1, 1, 1, 2, 1, 1})
      .RunExpecting(1);
  test.Case("conv3d")
      .In({1, 3, 5, 5, 3})
      .In({4, 3, 3, 3, 3})
      .Missing()
      .Out({1, 3, 5, 5, 4})
      .Scalars({1, 1, 1, 3, 1, 1})
      .RunExpecting(3);
  test.Case("conv3d_backward_data")
      .In({3, 5, 5, 4})
      .In({4, 3, 3, 3, 3})
      .Out({1, 3, 5, 5, 3})
      .Scalars({1, 1, 1, 2, 1, 1})
      .RunExpecting(1);
  test.Case("conv3d_backward_weights")
      .In({1, 3, 5, 5, 3})
      .In({1, 3, 5, 5, 4})
      .OutF32({4, 3, 3, 3, 3})
      .OutF32({5})
      .Scalars({1, 1, 1, 2, 1, 1, 0})
      .RunExpecting(1);
}
