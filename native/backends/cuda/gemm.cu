#include "backends/cuda/cublaslt.h"
#include "backends/cuda/gemm_kernel.h"

namespace {

template <class T, bool kAAlongK, bool kBAlongK>
int32_t Multiply(const PfArgs* args, const char* op, const GemmProblem& p, const CublasLtOperand& a,
                 const CublasLtOperand& b, const Epilogue& end) {
  const int m = static_cast<int>(p.m), n = static_cast<int>(p.n), k = static_cast<int>(p.k);
  GemmArgs<MatrixSource<T, kAAlongK>, MatrixSource<T, kBAlongK>, SameRows> g{};
  g.a = {static_cast<const T*>(a.data), a.line, a.batch, m, k};
  g.b = {static_cast<const T*>(b.data), b.line, b.batch, n, k};
  g.end = end;
  g.m = m;
  g.n = n;
  g.k = k;
  return RunGemm<T>(args, op, g, p.batch);
}

template <class T>
int32_t MultiplyAs(const PfArgs* args, const char* op, const GemmProblem& p) {
  constexpr int32_t kType = sizeof(T) == 4 ? PF_F32 : PF_BF16;
  const int64_t a_lines = p.trans_a ? p.k : p.m, b_lines = p.trans_b ? p.n : p.k;
  Prepared<T> pa, pb;
  PF_TRY(Prepare(args, op, p.a, (p.a_batch ? p.batch : 1) * a_lines, p.trans_a ? p.m : p.k, &pa));
  PF_TRY(Prepare(args, op, p.b, (p.b_batch ? p.batch : 1) * b_lines, p.trans_b ? p.k : p.n, &pb));
  const CublasLtOperand a{pa.data, pa.line, p.a_batch ? a_lines * pa.line : 0};
  const CublasLtOperand b{pb.data, pb.line, p.b_batch ? b_lines * pb.line : 0};
  if (CublasLtMatmul(args, p, kType, a, b)) return PF_OK;
  const bool packs = p.n % 8 == 0 && Aligned(p.y.data, 16) && Aligned(p.residual.data, 16);
  const Epilogue end{ArrayOf(p.bias), ArrayOf(p.residual), ArrayOf(p.y), p.activation, p.accumulate, packs};
  if (p.y.dtype == PF_F32 && p.activation != kActNone && p.residual.data != p.y.data) {
    // Nothing is lost when the library leaves bare sums in y and another pass finishes them.
    GemmProblem bare = p;
    bare.bias.data = bare.residual.data = nullptr;
    bare.activation = kActNone;
    if (CublasLtMatmul(args, bare, kType, a, b))
      return SumParts(args, PfData<float>(p.y), 1, p.batch * p.m, static_cast<int>(p.m),
                      static_cast<int>(p.n), SameRows{}, end);
  }
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
  return p.a.dtype == PF_BF16 && p.b.dtype == PF_BF16 ? MultiplyAs<Bf16>(args, op, p)
                                                      : MultiplyAs<float>(args, op, p);
}
