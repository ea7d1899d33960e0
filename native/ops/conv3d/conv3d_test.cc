#include "core/op_test.h"
#include "ops/matmul/direct_calls.h"

namespace {

struct Shape {
  int64_t b, t, h, w, c_in, c_out;
  int64_t kernel[3], stride[3], pad[3];

  op_test::Dims X() const { return {b, t, h, w, c_in}; }
  op_test::Dims W() const { return {c_out, c_in, kernel[0], kernel[1], kernel[2]}; }
  op_test::Dims Y() const {
    const int64_t in[3] = {t, h, w};
    int64_t out[3];
    for (int i = 0; i < 3; ++i) out[i] = (in[i] + pad[i] * (i ? 2 : 1) - kernel[i]) / stride[i] + 1;
    return {b, out[0], out[1], out[2], c_out};
  }
  std::vector<double> Scalars() const {
    std::vector<double> scalars;
    for (int64_t v : stride) scalars.push_back(v);
    for (int64_t v : pad) scalars.push_back(v);
    return scalars;
  }
};

void Forward(op_test::Test& test, const Shape& s, bool bias) {
  auto forward = test.Case("conv3d").In(s.X()).In(s.W());
  (bias ? forward.In({s.c_out}) : forward.Missing())
      .Out(s.Y())
      .Scalars(s.Scalars())
      .Tolerance(3e-6, 6e-3)
      .Run();
}

void BackwardData(op_test::Test& test, const Shape& s) {
  test.Case("conv3d_backward_data")
      .In(s.Y())
      .In(s.W())
      .Out(s.X())
      .Scalars(s.Scalars())
      .Tolerance(3e-6, 6e-3)
      .Run();
}

void BothWays(op_test::Test& test, const Shape& s, bool bias) {
  Forward(test, s, bias);
  BackwardData(test, s);
}

void AllThree(op_test::Test& test, const Shape& s, bool bias) {
  BothWays(test, s, bias);
  for (int accumulate = 0; accumulate <= 1; ++accumulate) {
    auto with = s.Scalars();
    with.push_back(accumulate);
    auto grad = test.Case("conv3d_backward_weights").In(s.X()).In(s.Y());
    accumulate ? grad.InOutF32(s.W()) : grad.OutF32(s.W());
    if (!bias)
      grad.OutMissing();
    else
      accumulate ? grad.InOutF32({s.c_out}) : grad.OutF32({s.c_out});
    grad.Scalars(with).Tolerance(3e-6, 3e-6).Run();
  }
}

int64_t CountOf(const op_test::Dims& dims) {
  int64_t n = 1;
  for (int64_t d : dims) n *= d;
  return n;
}

// Forward, data and weights.
void SameBits(const PfBackendTable* table, const Shape& s, bool bf16) {
  const int32_t type = bf16 ? PF_BF16 : PF_F32;
  const op_test::Dims x = s.X(), w = s.W(), y = s.Y();
  const int64_t xs = CountOf(x), ws = CountOf(w), ys = CountOf(y);
  auto x_data = Values(type, xs, 1), w_data = Values(type, ws, 2), dy_data = Values(type, ys, 3);
  const PfView x_view = View(x_data.data(), type, x), w_view = View(w_data.data(), type, w);
  const PfView dy_view = View(dy_data.data(), type, y), none = View(nullptr, type, {});
  auto scalars = s.Scalars(), overwriting = scalars;
  overwriting.push_back(0);
  SameBitsOnAnyThreads(table, "conv3d", {ys, xs, ws, s.c_out}, [&](const std::vector<float*>& out) {
    Call(table, PF_OP_conv3d, {x_view, w_view, none}, {View(out[0], PF_F32, y)}, scalars);
    Call(table, PF_OP_conv3d_backward_data, {dy_view, w_view}, {View(out[1], PF_F32, x)}, scalars);
    Call(table, PF_OP_conv3d_backward_weights, {x_view, dy_view},
         {View(out[2], PF_F32, w), View(out[3], PF_F32, {s.c_out})}, overwriting);
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
  Forward(test, {1, 2, 16, 28, 64, 64, {2, 3, 3}, {1, 1, 1}, {1, 1, 1}}, true);
  BackwardData(test, {1, 2, 21, 42, 64, 128, {2, 3, 3}, {1, 2, 2}, {1, 1, 1}});

  // Cut into several tiles and parts.
  EveryBackend([](const PfBackendTable* table) {
    const Shape s = {2, 5, 20, 24, 16, 24, {3, 3, 3}, {1, 1, 1}, {2, 1, 1}};
    for (int bf16 = 0; bf16 < 2; ++bf16) SameBits(table, s, bf16);
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

  // Enough squares of 2 x 2 and channels for Winograd's form: batches, odd sizes, several tiles of channels,
  // zeros in front, no padding.
  const Shape squares = {2, 2, 16, 18, 64, 80, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}};
  BothWays(test, squares, true);
  // A single frame that sees itself only; one that sees two of three.
  BothWays(test, {1, 1, 32, 34, 64, 64, {3, 3, 3}, {1, 1, 1}, {2, 1, 1}}, true);
  Forward(test, {1, 2, 32, 34, 64, 64, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}}, false);
  BothWays(test, {1, 6, 12, 18, 64, 64, {2, 3, 3}, {1, 1, 1}, {1, 1, 0}}, false);
  Forward(test, {1, 1, 31, 35, 64, 272, {1, 3, 3}, {1, 1, 1}, {0, 1, 0}}, true);
  EveryBackend([&](const PfBackendTable* table) {
    for (int bf16 = 0; bf16 < 2; ++bf16) SameBits(table, squares, bf16);
  });
}
