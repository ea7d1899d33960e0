#include <math.h>

#include "backends/ref/ref.h"
#include "ops/matmul/int8.h"
#include "ops/matmul/matmul.h"

namespace {

double Activate(double x, double kind) {
  if (kind == 1) return 0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
  if (kind == 2) return x / (1 + exp(-x));
  return x;
}

// A rotated group to whole numbers; returns its scale.
float QuantiseGroup(const PfView& x, int64_t at, int64_t n, double* q) {
  float v[kInt8Longest], largest = 0;
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(Get(x, at + i));
  Int8Rotate(v, n);
  for (int64_t i = 0; i < n; ++i)
    if (!(fabsf(v[i]) <= largest)) largest = fabsf(v[i]);
  const Int8Scale s = Int8ScaleOf(largest);
  for (int64_t i = 0; i < n; ++i) q[i] = nearbyintf(v[i] * s.inverse);
  return s.scale;
}

// Row i of x times row j of w, both rounded to eight bits.
double ProductInt8(const PfView& x, int64_t i, const PfView& w, int64_t j, int64_t k) {
  const Int8Groups groups = Int8GroupsOf(k);
  double sum = 0, q_x[kInt8Longest], q_w[kInt8Longest];
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t n = groups.Length(g, k), at = g * groups.size;
    const double scale_x = QuantiseGroup(x, i * k + at, n, q_x),
                 scale_w = QuantiseGroup(w, j * k + at, n, q_w);
    double whole = 0;
    for (int64_t q = 0; q < n; ++q) whole += q_x[q] * q_w[q];
    sum += whole * scale_x * scale_w;
  }
  return sum;
}

}  // namespace

int32_t pf_ref_matmul(const PfArgs* args) {
  MatmulShape s{};
  const int32_t status = GetMatmulShape(args, &s);
  if (status != PF_OK) return status;
  const MatmulParams& p = PfParams<MatmulParams>(args);
  const PfView &a = args->in[0], &b = args->in[1], &bias = args->in[2], &residual = args->in[3],
               &y = args->out[0];
  for (int64_t e = 0; e < s.batch; ++e)
    for (int64_t i = 0; i < s.m; ++i)
      for (int64_t j = 0; j < s.n; ++j) {
        double sum = 0;
        for (int64_t q = 0; q < s.k; ++q)
          sum += Get(a, e * s.a_batch + (s.trans_a ? q * s.m + i : i * s.k + q)) *
                 Get(b, e * s.b_batch + (s.trans_b ? j * s.k + q : q * s.n + j));
        const int64_t at = (e * s.m + i) * s.n + j;
        if (p.accumulate != 0) {
          Set(y, at, Get(y, at) + sum);
          continue;
        }
        sum = Activate(sum + (PfPresent(bias) ? Get(bias, j) : 0), p.activation);
        Set(y, at, sum + (PfPresent(residual) ? Get(residual, at) : 0));
      }
  return PF_OK;
}

int32_t pf_ref_matmul_pack(const PfArgs* args) {
  const PfView &w = args->in[0], &blob = args->out[0];
  const int64_t header[3] = {w.dims[0], w.dims[1],
                             static_cast<int64_t>(PfParams<MatmulPackParams>(args).form)};
  if (w.rank != 2 || PfCount(blob) < static_cast<int64_t>(24 + PfCount(w) * PfSize(w.dtype)))
    return Fail(args, PF_ERR_SHAPE, "matmul_pack: expected w [N, K] and a blob of pack_bytes");
  memcpy(blob.data, header, 24);
  memcpy(PfData<char>(blob) + 24, w.data, PfCount(w) * PfSize(w.dtype));
  return PF_OK;
}

int32_t pf_ref_matmul_packed(const PfArgs* args) {
  const PfView &x = args->in[0], &blob = args->in[1], &bias = args->in[2], &residual = args->in[3],
               &y = args->out[0];
  const MatmulPackedParams& p = PfParams<MatmulPackedParams>(args);
  int64_t header[3];
  memcpy(header, blob.data, 24);
  const int64_t n = header[0], k = header[1], m = PfCount(x) / k;
  if (n != p.n || x.dims[x.rank - 1] != k) return Fail(args, PF_ERR_SHAPE, "matmul_packed: shapes differ");
  const int32_t status = CheckPackedResult(args, m, n);
  if (status != PF_OK) return status;
  const int64_t width = y.dims[y.rank - 1], column = static_cast<int64_t>(p.column);
  // The element size follows from the blob's length: the reference packs any float dtype.
  const int64_t size = (PfCount(blob) - 24) / (n * k);
  PfView w{PfData<char>(blob) + 24, size == 8 ? PF_F64 : size == 4 ? PF_F32 : PF_BF16, 2, {n, k}};
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = PfPresent(bias) ? Get(bias, j) : 0;
      if (header[2] == PF_PACK_INT8)
        sum += ProductInt8(x, i, w, j, k);
      else
        for (int64_t q = 0; q < k; ++q) sum += Get(x, i * k + q) * Get(w, j * k + q);
      Set(y, i * width + column + j,
          Activate(sum, p.activation) + (PfPresent(residual) ? Get(residual, i * n + j) : 0));
    }
  return PF_OK;
}
