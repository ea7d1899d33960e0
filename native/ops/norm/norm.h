// Layer and RMS normalisation over the last axis. x [..., d] is folded to [N, d].
//
// norm_modulate [x[N,d], shift?[R,d], scale?[R,d], rows? i32[N]] -> [y[N,d], mean? f32[N], rstd? f32[N]]
//   y = (x - mean) * rstd * (1 + scale[rows[n]]) + shift[rows[n]],  rstd = 1 / sqrt(var + eps), var biased
//   without rows R is 1 and every row uses entry 0.
// norm_modulate_backward [x, mean, rstd, scale?, rows?, dy] -> [dx, dshift?[R,d], dscale?[R,d]]
// rms_norm [x[N,d], w[d]] -> [y[N,d], rstd? f32[N]]   y = x * rstd * w,  rstd = 1 / sqrt(mean(x^2) + eps)
// rms_norm_backward [x, w, rstd, dy] -> [dx, +dw? f32[d]]
#pragma once
#include "core/check.h"

struct NormParams {
  double eps;
};
struct RmsNormBackwardParams {
  double accumulate;
};

struct NormShape {
  int64_t rows = 0, d = 0, entries = 1;
  bool tables = false;  // whether there are any for rows to pick from
};

static inline int32_t NormFold(const PfArgs* a, const char* op, const PfView& x, NormShape* s) {
  if (x.rank < 1) return Fail(a, PF_ERR_SHAPE, "%s: expected x [..., d], received rank %d", op, x.rank);
  *s = {PfProduct(x, 0, x.rank - 1), x.dims[x.rank - 1], 1, false};
  return PF_OK;
}

static inline int32_t NormExpectCount(const PfArgs* a, const char* op, const char* name, const PfView& v,
                                      int64_t count) {
  if (!PfPresent(v) || PfCount(v) == count) return PF_OK;
  return Fail(a, PF_ERR_SHAPE, "%s: expected %s of %lld elements, received %lld", op, name,
              static_cast<long long>(count), static_cast<long long>(PfCount(v)));
}

// Tables are [R, d]; rows picks one entry per row.
static inline int32_t NormCheckTables(const PfArgs* a, const char* op, const PfView* tables[2],
                                      const PfView& rows, NormShape* s) {
  int64_t entries = 0;
  for (int i = 0; i < 2; ++i) {
    const PfView& t = *tables[i];
    if (!PfPresent(t)) continue;
    const int64_t count = PfCount(t);
    if (t.rank < 1 || t.dims[t.rank - 1] != s->d)
      return Fail(a, PF_ERR_SHAPE,
                  "%s: expected shift and scale [R, d] with d = %lld, received last axis %lld", op,
                  static_cast<long long>(s->d), static_cast<long long>(t.rank < 1 ? 0 : t.dims[t.rank - 1]));
    const int64_t r = s->d ? count / s->d : 0;
    if (entries && r != entries)
      return Fail(a, PF_ERR_SHAPE, "%s: shift and scale differ in their number of entries: %lld and %lld", op,
                  static_cast<long long>(entries), static_cast<long long>(r));
    entries = r;
  }
  if (!entries) return PF_OK;
  s->entries = entries;
  s->tables = true;
  if (!PfPresent(rows)) {
    if (entries == 1) return PF_OK;
    return Fail(a, PF_ERR_SHAPE,
                "%s: expected rows i32 [N] for %lld entries of shift and scale, received none", op,
                static_cast<long long>(entries));
  }
  if (rows.dtype != PF_I32) return Fail(a, PF_ERR_DTYPE, "%s: expected rows as i32", op);
  if (PfCount(rows) != s->rows)
    return Fail(a, PF_ERR_SHAPE, "%s: expected rows [N] with N = %lld, received %lld", op,
                static_cast<long long>(s->rows), static_cast<long long>(PfCount(rows)));
  return PF_OK;
}
// The values of rows, for kernels whose operands lie in the process's own memory.
static inline int32_t NormCheckRows(const PfArgs* a, const char* op, const PfView& rows, const NormShape& s) {
  if (!PfPresent(rows) || !s.tables) return PF_OK;
  const int32_t* index = PfData<int32_t>(rows);
  for (int64_t n = 0; n < s.rows; ++n)
    if (index[n] < 0 || index[n] >= s.entries)
      return Fail(a, PF_ERR_SHAPE, "%s: expected rows below %lld, received rows[%lld] = %d", op,
                  static_cast<long long>(s.entries), static_cast<long long>(n), index[n]);
  return PF_OK;
}

static inline int32_t NormModulateCheck(const PfArgs* a, NormShape* s) {
  const char* op = "norm_modulate";
  int32_t e = NormFold(a, op, a->in[0], s);
  if (e) return e;
  const PfView* tables[2] = {&a->in[1], &a->in[2]};
  if ((e = NormCheckTables(a, op, tables, a->in[3], s))) return e;
  if ((e = NormExpectCount(a, op, "y", a->out[0], s->rows * s->d))) return e;
  if ((e = NormExpectCount(a, op, "mean", a->out[1], s->rows))) return e;
  return NormExpectCount(a, op, "rstd", a->out[2], s->rows);
}

static inline int32_t NormModulateBackwardCheck(const PfArgs* a, NormShape* s) {
  const char* op = "norm_modulate_backward";
  int32_t e = NormFold(a, op, a->in[0], s);
  if (e) return e;
  // dshift and dscale are tables too, and either may be the only one that tells R.
  const PfView* given[2] = {PfPresent(a->in[3]) ? &a->in[3] : &a->out[2], &a->out[1]};
  if ((e = NormCheckTables(a, op, given, a->in[4], s))) return e;
  if ((e = NormExpectCount(a, op, "dscale", a->out[2], s->entries * s->d))) return e;
  if ((e = NormExpectCount(a, op, "dy", a->in[5], s->rows * s->d))) return e;
  if ((e = NormExpectCount(a, op, "dx", a->out[0], s->rows * s->d))) return e;
  if ((e = NormExpectCount(a, op, "mean", a->in[1], s->rows))) return e;
  return NormExpectCount(a, op, "rstd", a->in[2], s->rows);
}

static inline int32_t RmsNormCheck(const PfArgs* a, NormShape* s) {
  const char* op = "rms_norm";
  int32_t e = NormFold(a, op, a->in[0], s);
  if (e) return e;
  if ((e = NormExpectCount(a, op, "w", a->in[1], s->d))) return e;
  if ((e = NormExpectCount(a, op, "y", a->out[0], s->rows * s->d))) return e;
  return NormExpectCount(a, op, "rstd", a->out[1], s->rows);
}

static inline int32_t RmsNormBackwardCheck(const PfArgs* a, NormShape* s) {
  const char* op = "rms_norm_backward";
  int32_t e = NormFold(a, op, a->in[0], s);
  if (e) return e;
  if ((e = NormExpectCount(a, op, "w", a->in[1], s->d))) return e;
  if ((e = NormExpectCount(a, op, "rstd", a->in[2], s->rows))) return e;
  if ((e = NormExpectCount(a, op, "dy", a->in[3], s->rows * s->d))) return e;
  if ((e = NormExpectCount(a, op, "dx", a->out[0], s->rows * s->d))) return e;
  return NormExpectCount(a, op, "dw", a->out[1], s->d);
}

static inline int32_t NormModulateDtypes(const PfArgs* a) {
  return NeedFloats(a, "norm_modulate", 0, 1u << 1 | 1u << 2, 1u << 3);
}
static inline int32_t NormModulateBackwardDtypes(const PfArgs* a) {
  return NeedFloats(a, "norm_modulate_backward", 1u << 1 | 1u << 2, 0, 1u << 4);
}
static inline int32_t RmsNormDtypes(const PfArgs* a) { return NeedFloats(a, "rms_norm", 0, 1u << 1); }
static inline int32_t RmsNormBackwardDtypes(const PfArgs* a) {
  return NeedFloats(a, "rms_norm_backward", 1u << 2, 1u << 1);
}
