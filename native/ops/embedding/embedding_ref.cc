#include "backends/ref/ref.h"
#include "ops/embedding/embedding.h"

int32_t pf_ref_embedding(const PfArgs* a) {
  EmbeddingShape s;
  if (int32_t e = EmbeddingCheck(a, &s)) return e;
  if (int32_t e = EmbeddingCheckIndices(a, "embedding", a->in[1], s)) return e;
  for (int64_t n = 0; n < s.rows; ++n)
    for (int64_t i = 0; i < s.d; ++i)
      Set(a->out[0], n * s.d + i, Get(a->in[0], static_cast<int64_t>(Get(a->in[1], n)) * s.d + i));
  return PF_OK;
}

int32_t pf_ref_embedding_backward(const PfArgs* a) {
  EmbeddingShape s;
  if (int32_t e = EmbeddingBackwardCheck(a, &s)) return e;
  if (int32_t e = EmbeddingCheckIndices(a, "embedding_backward", a->in[0], s)) return e;
  const PfView& table = a->out[0];
  if (!PfParams<EmbeddingBackwardParams>(a).accumulate)
    for (int64_t i = 0; i < s.vocabulary * s.d; ++i) Set(table, i, 0);
  for (int64_t n = 0; n < s.rows; ++n)
    for (int64_t i = 0; i < s.d; ++i) {
      const int64_t at = static_cast<int64_t>(Get(a->in[0], n)) * s.d + i;
      Set(table, at, Get(table, at) + Get(a->in[1], n * s.d + i));
    }
  return PF_OK;
}
