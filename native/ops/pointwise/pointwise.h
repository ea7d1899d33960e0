// Element-wise ops on float tensors; every operand may be f32 or bf16.
//   unary           [x] -> [y]            y = f(x), f by kind
//   unary_backward  [x, dy] -> [dx]       dx = f'(x) dy
//   binary          [a, b] -> [y]         y = a (+ - * /) b; b broadcasts, right-aligned, to a's shape
//   axpby           [a, b?] -> [y]        y = alpha a + beta b + gamma; y may be the memory of a or b
//   gated_add       [x [N, d], y [N, d], gate [R, d], rows i32 [N]] -> [out [N, d]]   out = x + gate[rows] y
//   gated_add_backward [dout, y, gate, rows] -> [dy? [N, d], dgate? [R, d]]
//                   dy = gate[rows] dout, dgate[r] = sum over rows[n] = r of dout y
#pragma once
#include "core/half.h"  // PF_HD
#include "ops/pointwise/shape_text.h"

enum UnaryKind {
  kSilu = 0,
  kGeluTanh = 1,
  kExp = 2,
  kClamp = 3,
  kSquare = 4,
  kSqrt = 5,
  kSigmoid = 6,
  kTanh = 7,
  kQuickGelu = 8,
  kRelu = 9
};
enum BinaryKind { kAdd = 0, kSub = 1, kMul = 2, kDiv = 3 };

struct UnaryParams {
  double kind, a, b;  // a, b: the bounds of clamp
};
struct BinaryParams {
  double kind;
};
struct AxpbyParams {
  double alpha, beta, gamma;
};

// How b is read while a runs through memory: a's dims folded into groups that b either follows or repeats.
struct Broadcast {
  int rank = 0;
  int64_t dims[PF_MAX_RANK], strides[PF_MAX_RANK];  // strides in b, 0 where b repeats
};

static inline int32_t MakeBroadcast(const PfArgs* args, const PfView& a, const PfView& b, Broadcast* out) {
  if (b.rank > a.rank) return NeedSameDims(args, "binary", "b to broadcast to", a, b);
  int64_t stride = 1;
  for (int i = a.rank - 1; i >= 0; --i) {
    const int j = i - (a.rank - b.rank);
    const int64_t bd = j >= 0 ? b.dims[j] : 1, ad = a.dims[i];
    if (bd != ad && bd != 1) return NeedSameDims(args, "binary", "b to broadcast to", a, b);
    if (ad == 1) continue;
    const int64_t s = bd == 1 ? 0 : stride;
    stride *= bd;
    const int last = out->rank - 1;  // groups are collected from the innermost out
    if (out->rank && ((s == 0 && out->strides[last] == 0) ||
                      (s != 0 && out->strides[last] != 0 && s == out->strides[last] * out->dims[last]))) {
      out->dims[last] *= ad;
      continue;
    }
    out->dims[out->rank] = ad;
    out->strides[out->rank++] = s;
  }
  if (out->rank == 0) out->dims[0] = 1, out->strides[0] = 0, out->rank = 1;
  return PF_OK;
}
// Index in b of a's flat element i; dims are innermost first.
PF_HD static inline int64_t BroadcastIndex(const Broadcast& shape, int64_t i) {
  int64_t at = 0;
  for (int k = 0; k < shape.rank; ++k) {
    at += i % shape.dims[k] * shape.strides[k];
    i /= shape.dims[k];
  }
  return at;
}

static inline int32_t CheckUnary(const PfArgs* a, const char* op) {
  const int kind = static_cast<int>(PfParams<UnaryParams>(a).kind);
  if (kind < kSilu || kind > kRelu) return Fail(a, PF_ERR_OPTION, "%s: unknown kind %d", op, kind);
  for (int i = 1; i < a->n_in; ++i) PF_TRY(NeedSameDims(a, op, "dy", a->in[0], a->in[i]));
  return NeedSameDims(a, op, "the output", a->in[0], a->out[0]);
}
static inline int32_t CheckBinary(const PfArgs* a) {
  const int kind = static_cast<int>(PfParams<BinaryParams>(a).kind);
  if (kind < kAdd || kind > kDiv) return Fail(a, PF_ERR_OPTION, "binary: unknown kind %d", kind);
  return NeedSameDims(a, "binary", "y", a->in[0], a->out[0]);
}
static inline int32_t CheckAxpby(const PfArgs* a) {
  if (PfPresent(a->in[1])) PF_TRY(NeedSameDims(a, "axpby", "b", a->in[0], a->in[1]));
  return NeedSameDims(a, "axpby", "y", a->in[0], a->out[0]);
}
static inline int32_t CheckGated(const PfArgs* a, const char* op) {
  const PfView &x = a->in[0], &gate = a->in[2], &rows = a->in[3];
  if (x.rank < 1 || gate.rank != 2 || gate.dims[1] != x.dims[x.rank - 1])
    return Fail(a, PF_ERR_SHAPE, "%s: expected gate [R, d] with d of %s, received %s", op, ShapeText(x).text,
                ShapeText(gate).text);
  PF_TRY(NeedSameDims(a, op, "y", x, a->in[1]));
  const int64_t n = PfProduct(x, 0, x.rank - 1);
  if (rows.dtype != PF_I32 || PfCount(rows) != n)
    return Fail(a, PF_ERR_SHAPE, "%s: expected rows i32 [%lld], received %s", op, static_cast<long long>(n),
                ShapeText(rows).text);
  return PF_OK;
}
// The values of rows: for backends whose operands the host can read.
static inline int32_t CheckGatedRows(const PfArgs* a, const char* op) {
  const PfView &gate = a->in[2], &rows = a->in[3];
  for (int64_t i = 0; i < PfCount(rows); ++i) {
    const int32_t r = PfData<int32_t>(rows)[i];
    if (r < 0 || r >= gate.dims[0])
      return Fail(a, PF_ERR_SHAPE, "%s: expected rows in [0, %lld), received %d", op,
                  static_cast<long long>(gate.dims[0]), r);
  }
  return PF_OK;
}

static inline int32_t NeedGatedTypes(const PfArgs* a) {
  PF_TRY(NeedFloat(a, "gated_add", "x", a->in[0]));
  PF_TRY(NeedFloat(a, "gated_add", "y", a->in[1]));
  PF_TRY(NeedFloat(a, "gated_add", "gate", a->in[2]));
  return NeedFloat(a, "gated_add", "out", a->out[0]);
}
static inline int32_t NeedGatedBackwardTypes(const PfArgs* a) {
  PF_TRY(NeedFloat(a, "gated_add_backward", "dout", a->in[0]));
  PF_TRY(NeedFloat(a, "gated_add_backward", "y", a->in[1]));
  PF_TRY(NeedFloat(a, "gated_add_backward", "gate", a->in[2]));
  PF_TRY(NeedFloat(a, "gated_add_backward", "dy", a->out[0]));
  return NeedFloat(a, "gated_add_backward", "dgate", a->out[1]);
}
