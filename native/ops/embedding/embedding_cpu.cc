#include "backends/cpu/rows.h"
#include "ops/embedding/embedding.h"

int32_t pf_cpu_embedding(const PfArgs* a) {
  const char* op = "embedding";
  EmbeddingShape s;
  if (int32_t e = EmbeddingCheck(a, &s)) return e;
  if (int32_t e = EmbeddingCheckIndices(a, "embedding", a->in[1], s)) return e;
  const PfView &table = a->in[0], &y = a->out[0];
  if (!PfIsFloat(table) || !PfIsFloat(y))
    return Fail(a, PF_ERR_DTYPE, "%s: expected table and y as f32 or bf16", op);
  const int32_t* index = PfData<int32_t>(a->in[1]);
  const size_t bytes = s.d * PfSize(table.dtype);
  float* buffers = Scratch<float>(a, omp_get_max_threads() * RoundUp(s.d, 16));
  if (!buffers) return NoMemory(a, op);
#pragma omp parallel for schedule(static) if (s.rows * s.d > kParallelWork)
  for (int64_t n = 0; n < s.rows; ++n) {
    if (table.dtype == y.dtype) {
      memcpy(PfData<char>(y) + n * bytes, PfData<char>(table) + index[n] * bytes, bytes);
      continue;
    }
    // One side is f32, so the row passes through at most one conversion.
    float* to = OpenRow(y, n * s.d, buffers + omp_get_thread_num() * RoundUp(s.d, 16));
    CommitRow(y, n * s.d, s.d, ReadRow(table, index[n] * s.d, s.d, to));
  }
  return PF_OK;
}

int32_t pf_cpu_embedding_backward(const PfArgs* a) {
  const char* op = "embedding_backward";
  EmbeddingShape s;
  if (int32_t e = EmbeddingBackwardCheck(a, &s)) return e;
  if (int32_t e = EmbeddingCheckIndices(a, "embedding_backward", a->in[0], s)) return e;
  if (!PfIsFloat(a->in[1])) return Fail(a, PF_ERR_DTYPE, "%s: expected dy as f32 or bf16", op);
  if (a->out[0].dtype != PF_F32) return Fail(a, PF_ERR_DTYPE, "%s: expected dtable as f32", op);
  const int32_t* index = PfData<int32_t>(a->in[0]);
  float* table = PfData<float>(a->out[0]);
  if (!PfParams<EmbeddingBackwardParams>(a).accumulate) memset(table, 0, s.vocabulary * s.d * sizeof(float));
  // Threads own columns, never rows: equal indices meet in one thread, in order of n.
  constexpr int64_t kColumns = 64;
  const int64_t tasks = (s.d + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) if (s.rows * s.d > kParallelWork)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t c = task * kColumns, width = s.d - c < kColumns ? s.d - c : kColumns;
    float buffer[kColumns];
    for (int64_t n = 0; n < s.rows; ++n) {
      const float* dy = ReadRow(a->in[1], n * s.d + c, width, buffer);
      float* to = table + index[n] * s.d + c;
      ForLanes(width, [&](int64_t i, int64_t m) { StoreN(to + i, LoadN(to + i, m) + LoadN(dy + i, m), m); });
    }
  }
  return PF_OK;
}
