#include <cmath>

#include "core/op_test.h"
#include "ops/matmul/direct_calls.h"

namespace {

void Product(op_test::Test& test, int64_t batch, int64_t m, int64_t n, int64_t k, int trans,
             bool shared = false) {
  const bool ta = trans & 1, tb = trans & 2;
  op_test::Dims a = {ta ? k : m, ta ? m : k}, b = {tb ? n : k, tb ? k : n}, y = {m, n};
  if (batch) {
    a.insert(a.begin(), batch);
    if (!shared) b.insert(b.begin(), batch);
    y.insert(y.begin(), batch);
  }
  test.Case("matmul")
      .In(a)
      .In(b)
      .Missing()
      .Missing()
      .Out(y)
      .Scalars({ta + 0.0, tb + 0.0, 0, 0})
      .Tolerance(2e-6, 5e-3)
      .Run();
}

// A packed weight is the backend's own business, so it is judged by what it multiplies to: packed and plain
// products of the same operands must agree.
void Packed(const PfBackendTable* table, bool bf16, int64_t m, int64_t n, int64_t k, int activation) {
  const int32_t type = bf16 ? PF_BF16 : PF_F32;
  auto x = Values(type, m * k, 1), w = Values(type, n * k, 2), bias = Values(type, n, 3);
  auto residual = Values(type, m * n, 4);
  std::vector<float> packed(m * n), plain(m * n);
  std::vector<char> blob(table->pack_bytes(n, k, type, PF_PACK_PLAIN));
  const PfView x_view = View(x.data(), type, {m, k}), w_view = View(w.data(), type, {n, k});
  const PfView bias_view = View(bias.data(), type, {n}), residual_view = View(residual.data(), type, {m, n});
  const PfView blob_view = View(blob.data(), PF_U8, {static_cast<int64_t>(blob.size())});
  const double act = activation;
  Call(table, PF_OP_matmul_pack, {w_view}, {blob_view}, {PF_PACK_PLAIN});
  Call(table, PF_OP_matmul_packed, {x_view, blob_view, bias_view, residual_view},
       {View(packed.data(), PF_F32, {m, n})}, {static_cast<double>(n), act, 0});
  Call(table, PF_OP_matmul, {x_view, w_view, bias_view, residual_view}, {View(plain.data(), PF_F32, {m, n})},
       {0, 1, act, 0});
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < m * n; ++i) {
    difference += std::pow(packed[i] - plain[i], 2);
    norm += std::pow(plain[i], 2);
  }
  const bool agrees = difference <= 4e-12 * norm;
  // The same in the middle of wider rows, of which the rest stays.
  constexpr int64_t kBefore = 3, kAfter = 4;
  const int64_t width = kBefore + n + kAfter;
  const PfView none = View(nullptr, type, {});
  std::vector<float> wide(m * width, 7);
  Call(table, PF_OP_matmul_packed, {x_view, blob_view, bias_view, none},
       {View(wide.data(), PF_F32, {m, width})}, {static_cast<double>(n), act, kBefore});
  Call(table, PF_OP_matmul_packed, {x_view, blob_view, bias_view, none},
       {View(packed.data(), PF_F32, {m, n})}, {static_cast<double>(n), act, 0});
  double moved = 0;
  for (int64_t i = 0; i < m * width; ++i) {
    const int64_t column = i % width - kBefore;
    const bool inside = column >= 0 && column < n;
    moved += std::pow(wide[i] - (inside ? packed[i / width * n + column] : 7), 2);
  }
  if (agrees && moved <= 4e-12 * norm) return;
  if (agrees) difference = moved;
  std::printf("FAIL %s packed matmul [%lld,%lld,%lld] %s differs from matmul: %.3g\n", table->name,
              static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
              bf16 ? "bf16" : "f32", std::sqrt(difference / norm));
  std::exit(1);
}

// What eight bits make of x [m, k] and w [n, k], into columns of a wider y.
std::vector<float> Int8(const PfBackendTable* table, int32_t type, const std::vector<char>& x,
                        const std::vector<char>& w, const std::vector<char>& bias, int64_t m, int64_t n,
                        int64_t k, int64_t before = 0, int64_t after = 0) {
  std::vector<char> blob(table->pack_bytes(n, k, type, PF_PACK_INT8));
  const PfView blob_view = View(blob.data(), PF_U8, {static_cast<int64_t>(blob.size())});
  const PfView none = View(nullptr, type, {});
  auto view = [&](const std::vector<char>& v, const op_test::Dims& dims) {
    return View(const_cast<char*>(v.data()), type, dims);
  };
  const int64_t width = before + n + after;
  std::vector<float> y(m * width, 7);
  Call(table, PF_OP_matmul_pack, {view(w, {n, k})}, {blob_view}, {PF_PACK_INT8});
  Call(table, PF_OP_matmul_packed, {view(x, {m, k}), blob_view, view(bias, {n}), none},
       {View(y.data(), PF_F32, {m, width})}, {static_cast<double>(n), 1, static_cast<double>(before)});
  return y;
}

void Int8Fails(const PfBackendTable* table, const char* what, int64_t m, int64_t n, int64_t k, double off) {
  std::printf("FAIL %s product in eight bits [%lld,%lld,%lld]: %s, %.3g\n", table->name,
              static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k), what, off);
  std::exit(1);
}

double Relative(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += std::pow(static_cast<double>(a[i]) - b[i], 2);
    norm += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(difference / norm);
}

// The reference rounds to the same whole numbers, so that nothing but f32's own rounding is left between
// them.
void Int8AsReference(const PfBackendTable* table, bool bf16, int64_t m, int64_t n, int64_t k) {
  const int32_t type = bf16 ? PF_BF16 : PF_F32;
  const auto x = Values(type, m * k, 1), w = Values(type, n * k, 2), bias = Values(type, n, 3);
  static const Backend reference = OpenBackend(PF_OUT_DIR, "ref");
  const double off = Relative(Int8(table, type, x, w, bias, m, n, k, 3, 4),
                              Int8(reference.table, type, x, w, bias, m, n, k, 3, 4));
  if (!(off <= 5e-7)) Int8Fails(table, "differs from the reference's", m, n, k, off);
}

// How far eight bits are from a plain product. `loud`: one channel of x is a hundred times the others, as
// happens in trained networks, and w has small weights for it.
void Int8Rounds(const PfBackendTable* table, int64_t m, int64_t n, int64_t k, bool loud, double bound) {
  auto x = Values(PF_F32, m * k, 1), w = Values(PF_F32, n * k, 2), bias = Values(PF_F32, n, 3);
  auto scale = [&](std::vector<char>& v, int64_t rows, float by) {
    for (int64_t i = 0; i < rows; ++i) reinterpret_cast<float*>(v.data())[i * k + k / 3] *= by;
  };
  if (loud) scale(x, m, 100);
  if (loud) scale(w, n, 0.01f);
  std::vector<float> plain(m * n);
  Call(table, PF_OP_matmul,
       {View(x.data(), PF_F32, {m, k}), View(w.data(), PF_F32, {n, k}), View(bias.data(), PF_F32, {n}),
        View(nullptr, PF_F32, {})},
       {View(plain.data(), PF_F32, {m, n})}, {0, 1, 1, 0});
  const double off = Relative(Int8(table, PF_F32, x, w, bias, m, n, k), plain);
  if (!(off <= bound)) Int8Fails(table, loud ? "far off with a loud channel" : "far off", m, n, k, off);
}

// A row has the same bits whatever stands beside it, for any number of threads; one with NaN is all NaN, and
// no other.
void Int8Rows(const PfBackendTable* table, int64_t m, int64_t n, int64_t k) {
  const auto w = Values(PF_BF16, n * k, 2), bias = Values(PF_BF16, n, 3);
  auto x = Values(PF_BF16, m * k, 1);
  std::vector<float> all;
  SameBitsOnAnyThreads(table, "matmul_packed, eight bits", {m * n}, [&](const std::vector<float*>& y) {
    all = Int8(table, PF_BF16, x, w, bias, m, n, k);
    std::memcpy(y[0], all.data(), all.size() * 4);
  });
  const int64_t row = m - 2;
  const std::vector<char> one(x.begin() + row * k * 2, x.begin() + (row + 1) * k * 2);
  const auto alone = Int8(table, PF_BF16, one, w, bias, 1, n, k);
  if (std::memcmp(alone.data(), &all[row * n], n * 4)) Int8Fails(table, "a row alone differs", m, n, k, 0);
  const Bf16 nan = ToBf16(NAN);
  std::memcpy(&x[(row * k + k - 1) * 2], &nan, 2);
  const auto broken = Int8(table, PF_BF16, x, w, bias, m, n, k);
  for (int64_t i = 0; i < m * n; ++i)
    if (std::isnan(broken[i]) != (i / n == row)) Int8Fails(table, "NaN is elsewhere", m, n, k, i);
}

void SameBits(const PfBackendTable* table, bool bf16, int trans, int64_t m, int64_t n, int64_t k) {
  const int32_t type = bf16 ? PF_BF16 : PF_F32;
  auto a = Values(type, m * k, 1), b = Values(type, n * k, 2);
  const bool ta = trans & 1, tb = trans & 2;
  const PfView a_view = View(a.data(), type, {ta ? k : m, ta ? m : k}), none = View(nullptr, type, {});
  const PfView b_view = View(b.data(), type, {tb ? n : k, tb ? k : n});
  SameBitsOnAnyThreads(table, "matmul", {m * n}, [&](const std::vector<float*>& y) {
    Call(table, PF_OP_matmul, {a_view, b_view, none, none}, {View(y[0], PF_F32, {m, n})},
         {ta + 0.0, tb + 0.0, 0, 0});
  });
}

}  // namespace

PF_CASES(matmul) {
  for (int trans = 0; trans < 4; ++trans) {
    Product(test, 0, 1, 1, 1, trans);
    Product(test, 0, 1, 130, 33, trans);
    Product(test, 0, 37, 1, 65, trans);
    Product(test, 0, 33, 65, 17, trans);
    Product(test, 3, 5, 7, 9, trans);
    Product(test, 2, 20, 24, 40, trans, true);
    Product(test, 3, 20, 24, 300, trans);  // long and narrow: its sums may be cut
  }
  for (int trans = 0; trans < 4; ++trans) Product(test, 0, 530, 300, 260, trans);  // so tall that b is packed
  Product(test, 0, 300, 530, 64, 0);
  Product(test, 0, 300, 530, 64, 3);
  Product(test, 0, 260, 520, 270, 2);
  Product(test, 0, 70, 270, 700, 1);
  Product(test, 2, 140, 200, 40, 0);

  for (int activation = 0; activation < 3; ++activation)
    for (int which = 0; which < 4; ++which) {
      auto c = test.Case("matmul").In({2, 19, 48}).In({70, 48}, 0.2);
      which & 1 ? c.In({70}) : c.Missing();
      which & 2 ? c.In({2, 19, 70}) : c.Missing();
      c.Out({2, 19, 70}).Scalars({0, 1, activation + 0.0, 0}).Tolerance(2e-6, 5e-3).Run();
    }
  test.Case("matmul")
      .In({2, 19, 300})
      .In({70, 300}, 0.1)
      .In({70})
      .In({2, 19, 70})
      .Out({2, 19, 70})
      .Scalars({0, 1, 1, 0})
      .Tolerance(2e-6, 5e-3)
      .Run();
  for (int trans = 0; trans < 4; ++trans)
    test.Case("matmul")
        .In({trans & 1 ? 40 : 24, trans & 1 ? 24 : 40})
        .In({trans & 2 ? 31 : 40, trans & 2 ? 40 : 31})
        .Missing()
        .Missing()
        .InOut({24, 31})
        .Scalars({trans & 1 ? 1.0 : 0, trans & 2 ? 1.0 : 0, 0, 1})
        .Tolerance(2e-6, 5e-3)
        .Run();
  // f32 results of bf16 operands: a weight gradient.
  for (int64_t tokens : {90, 400})
    test.Case("matmul")
        .In({tokens, 24})
        .In({tokens, 31})
        .Missing()
        .Missing()
        .InOutF32({24, 31})
        .Scalars({1, 0, 0, 1})
        .Tolerance(2e-6, 2e-6)
        .Run();
  test.Case("matmul")
      .In({90, 24})
      .InF32({24, 31})
      .InF32({31})
      .In({90, 31})
      .OutF32({90, 31})
      .Scalars({0, 0, 1, 0})
      .Tolerance(2e-6, 2e-6)
      .Run();

  EveryBackend([](const PfBackendTable* table) {
    for (int bf16 = 0; bf16 < 2; ++bf16) {
      for (int64_t m : {1, 7, 64, 1100}) {
        Packed(table, bf16, m, 96, 80, 1);
        Packed(table, bf16, m, 600, 72, 0);
        Packed(table, bf16, m, 33, 17, 2);
        Packed(table, bf16, m, 512, 129, 0);
      }
      for (int trans = 0; trans < 4; ++trans) {
        SameBits(table, bf16, trans, 300, 540, 1500);
        SameBits(table, bf16, trans, 600, 300, 300);
      }
      SameBits(table, bf16, 1, 64, 48, 9000);
    }
    if (!table->pack_bytes(300, 1030, PF_BF16, PF_PACK_INT8)) return;
    for (int bf16 = 0; bf16 < 2; ++bf16)
      for (int64_t m : {1, 7, 150}) {
        Int8AsReference(table, bf16, m, 33, 17);
        Int8AsReference(table, bf16, m, 96, 80);
        Int8AsReference(table, bf16, m, 300, 129);
        Int8AsReference(table, bf16, m, 40, 1030);
        Int8AsReference(table, bf16, m, 24, 1920);
      }
    Int8Rounds(table, 300, 530, 1920, false, 1.2e-2);
    Int8Rounds(table, 300, 530, 2500, false, 1.2e-2);
    Int8Rounds(table, 300, 530, 1920, true, 5e-2);
    Int8Rows(table, 300, 530, 1920);
    Int8Rows(table, 37, 70, 50);
  });

  test.Case("matmul")
      .In({4, 5})
      .In({6, 7})
      .Missing()
      .Missing()
      .Out({4, 7})
      .Scalars({0, 0, 0, 0})
      .RunExpecting(1);
  test.Case("matmul")
      .In({2, 4, 5})
      .In({3, 5, 7})
      .Missing()
      .Missing()
      .Out({2, 4, 7})
      .Scalars({0, 0, 0, 0})
      .RunExpecting(1);
  test.Case("matmul")
      .In({4, 5})
      .In({5, 7})
      .In({6})
      .Missing()
      .Out({4, 7})
      .Scalars({0, 0, 0, 0})
      .RunExpecting(1);
  test.Case("matmul")
      .In({4, 5})
      .In({5, 7})
      .Missing()
      .Missing()
      .Out({4, 6})
      .Scalars({0, 0, 0, 0})
      .RunExpecting(1);
  test.Case("matmul")
      .In({4, 5})
      .In({5, 7})
      .Missing()
      .Missing()
      .Out({4, 7})
      .Scalars({0, 0, 3, 0})
      .RunExpecting(3);
  test.Case("matmul")
      .In({4, 5})
      .In({5, 7})
      .In({7})
      .Missing()
      .InOut({4, 7})
      .Scalars({0, 0, 0, 1})
      .RunExpecting(3);
  test.Case("matmul")
      .InInt({4, 5}, [](int64_t i) { return i; })
      .In({5, 7})
      .Missing()
      .Missing()
      .Out({4, 7})
      .Scalars({0, 0, 0, 0})
      .RunExpecting(2);
  test.Case("matmul_pack").In({4, 5}).OutU8({7}).Scalars({0}).RunExpecting(1);
  test.Case("matmul_packed")
      .In({4, 5})
      .InU8({4000}, [](int64_t) { return 1; })
      .Missing()
      .Missing()
      .Out({4, 6})
      .Scalars({6, 0, 0})
      .RunExpecting(3);
}
