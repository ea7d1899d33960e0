#include "backends/cuda/cublaslt.h"
#include "backends/cuda/gemm_kernel.h"

namespace {

template <class T, bool kAAlongK, bool kBAlongK>
int32_t Multiply(const PfArgs* args, const char* op, const GemmProblem& p, const Prepared<T>& a,
                 const Prepared<T>& b, const Epilogue& end) {
  const int m = static_cast<int>(p.m), n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  GemmArgs<MatrixSource<T, kAAlongK>, MatrixSource<T, kBAlongK>, SameRows> g{};
  g.a = {a.data, a.line, p.a_batch ? (p.trans_a ? k : m) * a.line : 0, m, k};
  g.b = {b.data, b.line, p.b_batch ? (p.trans_b ? n : k) * b.line : 0, n, k};
  g.end = end;
  g.m = m;
  g.n = n;
  g.k = k;
  return RunGemm<T>(args, op, g, p.batch);
}

template <class T>
int32_t MultiplyAs(const PfArgs* args, const char* op, const GemmProblem& p, const Epilogue& end) {
  Prepared<T> a, b;
  const int64_t a_entries = p.a_batch ? p.batch : 1, b_entries = p.b_batch ? p.batch : 1;
  PF_TRY(Prepare(args, op, p.a, a_entries * (p.trans_a ? p.k : p.m), p.trans_a ? p.m : p.k, &a));
  PF_TRY(Prepare(args, op, p.b, b_entries * (p.trans_b ? p.n : p.k), p.trans_b ? p.k : p.n, &b));
  if (p.trans_a)
    return p.trans_b ? Multiply<T, false, true>(args, op, p, a, b, end)
                     : Multiply<T, false, false>(args, op, p, a, b, end);
  return p.trans_b ? Multiply<T, true, true>(args, op, p, a, b, end)
                   : Multiply<T, true, false>(args, op, p, a, b, end);
}

}  // namespace

int32_t Gemm(const PfArgs* args, const char* op, const GemmProblem& p) {
  constexpr int64_t kMost = 1 << 30;
  if (p.m > kMost || p.n > kMost || p.k > kMost)
    return Fail(args, PF_ERR_SHAPE, "%s: lengths of a product are at most 2^30 on this device", op);
  if (CublasLtMatmul(args, p)) return PF_OK;
  const Epilogue end{ArrayOf(p.bias), ArrayOf(p.residual),
                     ArrayOf(p.y),    p.activation,
                     p.accumulate,    p.n % 8 == 0 && Aligned(p.y.data, 16) && Aligned(p.residual.data, 16)};
  return p.a.dtype == PF_BF16 && p.b.dtype == PF_BF16 ? MultiplyAs<Bf16>(args, op, p, end)
                                                      : MultiplyAs<float>(args, op, p, end);
}
