#include "ops/pointwise/blocks.h"
#include "ops/reduce/reduce.h"

namespace {

// A contiguous run in double lanes of fixed number: the same bits on every level.
double SumRun(const PfView& x, int64_t at, int64_t n) {
  alignas(64) float buffer[kBlock];
  double lanes[16] = {};
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t m = MinOf(kBlock, n - done);
    const float* p = ReadBlock(x, at + done, m, buffer);
    int64_t i = 0;
    for (; i + 16 <= m; i += 16)
      for (int k = 0; k < 16; ++k) lanes[k] += p[i + k];
    for (; i < m; ++i) lanes[i % 16] += p[i];
  }
  for (int w = 8; w; w /= 2)
    for (int k = 0; k < w; ++k) lanes[k] += lanes[k + w];
  return lanes[0];
}

}  // namespace

int32_t pf_cpu_sum(const PfArgs* a) {
  PF_TRY(CheckSum(a));
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(NeedFloat(a, "sum", "x", x));
  PF_TRY(NeedFloat(a, "sum", "y", y));
  const SumParams& p = PfParams<SumParams>(a);
  const int64_t outer = p.outer, count = p.count, inner = p.inner;
  if (outer * inner == 0) return PF_OK;
  // Chunks of rows whose partial sums are combined in order: their size depends on the shape alone, never on
  // threads. Wide columns, because hardware prefetching ends at a page.
  constexpr int64_t kColumns = 2048;
  const int64_t rows = inner == 1 ? 1 << 15 : MinOf(1024, 32 + (1 << 16) / inner);
  const int64_t chunks = count ? (count + rows - 1) / rows : 1, columns = (inner + kColumns - 1) / kColumns;
  double* partial =
      static_cast<double*>(a->context->scratch(a->context, outer * chunks * inner * sizeof(double)));
  if (!partial) return Fail(a, PF_ERR_MEMORY, "sum: no scratch memory");
  ForTasks(outer * chunks * columns, PfCount(x), [&](int64_t task) {
    const int64_t column = task % columns * kColumns, chunk = task / columns % chunks,
                  o = task / columns / chunks;
    const int64_t first = chunk * rows, last = MinOf(count, first + rows),
                  n = MinOf(kColumns, inner - column);
    double* out = partial + (o * chunks + chunk) * inner + column;
    if (inner == 1) {
      *out = SumRun(x, o * count + first, last - first);
      return;
    }
    alignas(64) float sum[kColumns] = {}, buffer[kColumns];
    for (int64_t row = first; row < last; ++row)
      Map(n, sum, ReadBlock(x, (o * count + row) * inner + column, n, buffer), sum,
          [](Vf u, Vf v) { return u + v; });
    for (int64_t i = 0; i < n; ++i) out[i] = sum[i];
  });
  ForTasks((outer * inner + kColumns - 1) / kColumns, outer * chunks * inner, [&](int64_t task) {
    for (int64_t i = task * kColumns; i < MinOf(outer * inner, (task + 1) * kColumns); ++i) {
      const double* from = partial + i / inner * chunks * inner + i % inner;
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += from[c * inner];
      sum *= p.scale;
      float f = static_cast<float>(sum), before;
      if (p.accumulate != 0) f = static_cast<float>(*ReadBlock(y, i, 1, &before) + sum);
      *BeginWrite(y, i, &before) = f;
      EndWrite(y, i, 1, &f);
    }
  });
  return PF_OK;
}
