// Matrix products.
//
// matmul         y = act(a b + bias) + residual, or y += a b (accumulate).
//                a [..., M, K] or [..., K, M] (trans_a); b [..., K, N] or [..., N, K] (trans_b), leading dims
//                those of a, or none: one b for the whole batch. bias [N], residual like y [..., M, N].
// matmul_pack    w [N, K] -> u8 blob of the backend's pack_bytes(N, K): the weight as the backend likes to
// read it, or, in form 1, rounded to eight bits (int8.h).
// matmul_packed  y [..., N] = act(x wT + bias) + residual, x [..., K]; x is rounded to eight bits where w
// was. y may be wider: the result goes to its columns from `column` on, without a residual. act: 0 none, 1
// gelu (tanh form), 2 silu. Sums are f32 whatever the dtypes; y is rounded once, at the end.
#pragma once
#include "core/check.h"

struct MatmulParams {
  double trans_a, trans_b, activation, accumulate;
};
struct MatmulPackParams {
  double form;  // PfPackForm
};
struct MatmulPackedParams {
  double n, activation, column;
};

// The lengths a matmul call means. Fills shape or refuses.
struct MatmulShape {
  int64_t batch, m, n, k;
  int64_t a_batch, b_batch;  // elements from one batch entry to the next; b_batch 0: b is shared
  bool trans_a, trans_b;
};

static inline int32_t CheckEpilogue(const PfArgs* a, const char* op, const PfView& bias,
                                    const PfView& residual, const PfView& y, int64_t n, double activation) {
  if (!(activation == 0 || activation == 1 || activation == 2))
    return Fail(a, PF_ERR_OPTION, "%s: activation is 0, 1 or 2, received %g", op, activation);
  if (PfPresent(bias) && PfCount(bias) != n)
    return Fail(a, PF_ERR_SHAPE, "%s: expected bias [%lld], received %lld values", op, (long long)n,
                (long long)PfCount(bias));
  if (PfPresent(residual) && PfCount(residual) != PfCount(y))
    return Fail(a, PF_ERR_SHAPE, "%s: expected a residual of y's %lld values, received %lld", op,
                (long long)PfCount(y), (long long)PfCount(residual));
  return PF_OK;
}

static inline int32_t GetMatmulShape(const PfArgs* args, MatmulShape* s) {
  const PfView &a = args->in[0], &b = args->in[1], &y = args->out[0];
  const MatmulParams& p = PfParams<MatmulParams>(args);
  s->trans_a = p.trans_a != 0;
  s->trans_b = p.trans_b != 0;
  if (a.rank < 2 || b.rank < 2 || (b.rank != 2 && b.rank != a.rank))
    return Fail(args, PF_ERR_SHAPE,
                "matmul: expected a of rank >= 2 and b of rank 2 or a's rank, received %d and %d", a.rank,
                b.rank);
  s->m = a.dims[a.rank - (s->trans_a ? 1 : 2)];
  s->k = a.dims[a.rank - (s->trans_a ? 2 : 1)];
  s->n = b.dims[b.rank - (s->trans_b ? 2 : 1)];
  const int64_t b_k = b.dims[b.rank - (s->trans_b ? 1 : 2)];
  if (b_k != s->k || s->k == 0)
    return Fail(args, PF_ERR_SHAPE,
                "matmul: inner lengths must be equal and positive, received K = %lld in a, %lld in b",
                (long long)s->k, (long long)b_k);
  s->batch = PfProduct(a, 0, a.rank - 2);
  for (int i = 0; b.rank > 2 && i < b.rank - 2; ++i)
    if (a.dims[i] != b.dims[i])
      return Fail(args, PF_ERR_SHAPE, "matmul: dim %d is %lld in a but %lld in b", i, (long long)a.dims[i],
                  (long long)b.dims[i]);
  if (y.rank < 2 || y.dims[y.rank - 1] != s->n || PfCount(y) != s->batch * s->m * s->n)
    return Fail(args, PF_ERR_SHAPE, "matmul: expected y [%lld x %lld, %lld], received %lld values",
                (long long)s->batch, (long long)s->m, (long long)s->n, (long long)PfCount(y));
  s->a_batch = s->m * s->k;
  s->b_batch = b.rank > 2 ? s->n * s->k : 0;
  // A shared b makes the batch one tall matrix.
  if (!s->b_batch && !s->trans_a) {
    s->m *= s->batch;
    s->batch = 1;
  }
  if (p.accumulate != 0 && (PfPresent(args->in[2]) || PfPresent(args->in[3]) || p.activation != 0))
    return Fail(args, PF_ERR_OPTION, "matmul: accumulate takes no bias, activation or residual");
  return CheckEpilogue(args, "matmul", args->in[2], args->in[3], y, s->n, p.activation);
}

// Of matmul_packed: m rows of n columns somewhere in y's rows.
static inline int32_t CheckPackedResult(const PfArgs* args, int64_t m, int64_t n) {
  const PfView &residual = args->in[3], &y = args->out[0];
  const MatmulPackedParams& p = PfParams<MatmulPackedParams>(args);
  const int64_t width = y.rank >= 1 ? y.dims[y.rank - 1] : 0;
  if (!(p.column >= 0 && p.column + n <= width) || PfCount(y) != m * width)
    return Fail(
        args, PF_ERR_SHAPE,
        "matmul_packed: expected y of %lld rows with columns %g to %g, received %lld values in rows of %lld",
        (long long)m, p.column, p.column + n, (long long)PfCount(y), (long long)width);
  if (width > n && PfPresent(residual))
    return Fail(args, PF_ERR_OPTION, "matmul_packed: part of a tensor takes no residual");
  return CheckEpilogue(args, "matmul_packed", args->in[2], residual, y, n, p.activation);
}

// A packed weight is bytes, everything else f32 or bf16.
static inline int32_t CheckMatmulFloats(const PfArgs* args, const char* op, bool packed) {
  for (int i = 0; i < 5; ++i) {
    const PfView& v = i < 4 ? args->in[i] : args->out[0];
    if (PfPresent(v) && !PfIsFloat(v) && !(packed && i == 1))
      return Fail(args, PF_ERR_DTYPE, "%s: operands are f32 or bf16, received dtype %d", op, v.dtype);
  }
  return PF_OK;
}
