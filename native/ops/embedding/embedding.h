// Rows of a table by index.
//
// embedding [table[V,d], idx i32[N]] -> [y[N,d]]            y[n] = table[idx[n]]
// embedding_backward [idx i32[N], dy[N,d]] -> [+dtable f32[V,d]]   dtable[idx[n]] (= 0 first | +)= dy[n], in
// order of n An index outside [0, V) is refused.
#pragma once
#include "core/check.h"

struct EmbeddingBackwardParams {
  double accumulate;
};

struct EmbeddingShape {
  int64_t vocabulary = 0, d = 0, rows = 0;
};

static inline int32_t EmbeddingFold(const PfArgs* a, const char* op, const PfView& table, const PfView& idx,
                                    const PfView& y, EmbeddingShape* s) {
  if (table.rank != 2)
    return Fail(a, PF_ERR_SHAPE, "%s: expected a table [V, d], received rank %d", op, table.rank);
  if (idx.dtype != PF_I32) return Fail(a, PF_ERR_DTYPE, "%s: expected idx as i32", op);
  *s = {table.dims[0], table.dims[1], PfCount(idx)};
  if (PfCount(y) != s->rows * s->d)
    return Fail(a, PF_ERR_SHAPE,
                "%s: expected [N, d] = %lld elements beside idx [N] and the table, received %lld", op,
                static_cast<long long>(s->rows * s->d), static_cast<long long>(PfCount(y)));
  return PF_OK;
}

// The values of idx: for backends whose operands the host can read.
static inline int32_t EmbeddingCheckIndices(const PfArgs* a, const char* op, const PfView& idx,
                                            const EmbeddingShape& s) {
  const int32_t* index = PfData<int32_t>(idx);
  for (int64_t n = 0; n < s.rows; ++n)
    if (index[n] < 0 || index[n] >= s.vocabulary)
      return Fail(a, PF_ERR_SHAPE, "%s: expected idx below %lld, received idx[%lld] = %d", op,
                  static_cast<long long>(s.vocabulary), static_cast<long long>(n), index[n]);
  return PF_OK;
}

static inline int32_t EmbeddingCheck(const PfArgs* a, EmbeddingShape* s) {
  return EmbeddingFold(a, "embedding", a->in[0], a->in[1], a->out[0], s);
}
static inline int32_t EmbeddingBackwardCheck(const PfArgs* a, EmbeddingShape* s) {
  return EmbeddingFold(a, "embedding_backward", a->out[0], a->in[0], a->in[1], s);
}
