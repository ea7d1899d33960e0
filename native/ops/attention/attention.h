// Softmax attention without an L x L matrix; masks are two integers per token.
//
// attention [q[B,L,H,D], k[B,Lk,H,D], v[B,Lk,H,D], segment? i32[B,Lk], order? i32[B,Lk], wq? [G,D], wk?
// [G,D],
//            cos? f32[B Lk,D/2], sin? f32[B Lk,D/2]] -> [o[B,L,H,D], lse f32[B,H,L]]
//   i sees j iff segment[i] == segment[j] and order[i] >= order[j], where the queries are the first L <= Lk
//   tokens of the keys' sequence; both absent: everything, and L and Lk are independent
//   s = scale * q_i . k_j,  lse_i = log sum_j exp(s_ij),  o_i = sum_j exp(s_ij - lse_i) v_j  over the visible
//   j; a row that sees nothing gives o = 0 and lse = -inf
//   with any of wq, wk, cos and sin, q and k are first normalised and rotated as by the op rope. G = 2: the
//   first `split` tokens of every sequence take the first row of wq and wk, the others the second; without a
//   mask then Lk = L
// attention_backward [q, k, v, segment?, order?, o, lse, do] -> [dq, dk, dv]
//   p = exp(s - lse), ds = p (do_i . v_j - do_i . o_i);  dv_j = sum p do_i, dk_j = scale sum ds q_i, dq_i =
//   scale sum ds k_j
#pragma once
#include "core/check.h"
#include "core/half.h"

struct AttentionParams {
  double scale;
};

// Read only where q and k are normalised.
struct AttentionNormParams {
  double scale, eps, split;
};

struct AttentionShape {
  int64_t batch = 0, lq = 0, lk = 0, heads = 0, d = 0;
  bool masked = false;
};

// The least and greatest mask values of a block of tokens, and what follows for a tile of two blocks.
struct alignas(16) MaskBounds {
  int32_t segment_min, segment_max, order_min, order_max;
};
enum Visibility { kNothing, kSome, kAll };

PF_HD static inline Visibility See(const MaskBounds& queries, const MaskBounds& keys) {
  if (queries.segment_max < keys.segment_min || queries.segment_min > keys.segment_max ||
      queries.order_max < keys.order_min)
    return kNothing;
  const bool one_segment = queries.segment_min == queries.segment_max && keys.segment_min == keys.segment_max;
  return one_segment && queries.order_min >= keys.order_max ? kAll : kSome;
}

static inline int32_t AttentionFold(const PfArgs* a, const char* op, AttentionShape* s) {
  const PfView &q = a->in[0], &k = a->in[1], &v = a->in[2], &segment = a->in[3], &order = a->in[4];
  if (q.rank != 4) return Fail(a, PF_ERR_SHAPE, "%s: expected q [B, L, H, D], received rank %d", op, q.rank);
  *s = {q.dims[0], q.dims[1], k.rank == 4 ? k.dims[1] : 0, q.dims[2], q.dims[3], PfPresent(segment)};
  if (k.rank != 4 || k.dims[0] != s->batch || k.dims[2] != s->heads || k.dims[3] != s->d)
    return Fail(
        a, PF_ERR_SHAPE,
        "%s: expected k [B, Lk, H, D] with B = %lld, H = %lld, D = %lld, received rank %d [%lld, %lld, %lld, "
        "%lld]",
        op, static_cast<long long>(s->batch), static_cast<long long>(s->heads), static_cast<long long>(s->d),
        k.rank, static_cast<long long>(k.rank > 0 ? k.dims[0] : 0),
        static_cast<long long>(k.rank > 1 ? k.dims[1] : 0),
        static_cast<long long>(k.rank > 2 ? k.dims[2] : 0),
        static_cast<long long>(k.rank > 3 ? k.dims[3] : 0));
  if (!PfSameDims(k, v)) return Fail(a, PF_ERR_SHAPE, "%s: expected v with the shape of k", op);
  if (PfPresent(segment) != PfPresent(order))
    return Fail(a, PF_ERR_SHAPE, "%s: expected both segment and order or none", op);
  if (!s->masked) return PF_OK;
  if (s->lk < s->lq)
    return Fail(a, PF_ERR_SHAPE,
                "%s: expected k at least as long as q beside segment and order: L = %lld, received %lld", op,
                static_cast<long long>(s->lq), static_cast<long long>(s->lk));
  if (segment.dtype != PF_I32 || order.dtype != PF_I32)
    return Fail(a, PF_ERR_DTYPE, "%s: expected segment and order as i32", op);
  if (PfCount(segment) != s->batch * s->lk || PfCount(order) != s->batch * s->lk)
    return Fail(a, PF_ERR_SHAPE, "%s: expected segment and order [B, Lk] with B = %lld and Lk = %lld", op,
                static_cast<long long>(s->batch), static_cast<long long>(s->lk));
  return PF_OK;
}

// An operand at the end of the list, which callers without it may cut short.
static inline PfView AttentionInput(const PfArgs* a, int i) {
  PfView none = {};
  none.rank = -1;
  return i < a->n_in ? a->in[i] : none;
}

static inline bool AttentionTurns(const PfArgs* a) {
  for (int i = 5; i < 9; ++i)
    if (PfPresent(AttentionInput(a, i))) return true;
  return false;
}

// What is done to q and k before they meet.
static inline int32_t AttentionTurnCheck(const PfArgs* a, const char* op, const AttentionShape& s) {
  if (!AttentionTurns(a)) return PF_OK;
  const PfView cos = AttentionInput(a, 7), sin = AttentionInput(a, 8);
  if (!s.masked && s.lq != s.lk)
    return Fail(a, PF_ERR_SHAPE, "%s: expected k as long as q beside norms or angles without a mask", op);
  for (int i = 5; i < 7; ++i) {
    const PfView w = AttentionInput(a, i);
    if (PfPresent(w) && PfCount(w) != s.d && PfCount(w) != 2 * s.d)
      return Fail(a, PF_ERR_SHAPE, "%s: expected norm weights [1, D] or [2, D] with D = %lld, received %lld",
                  op, static_cast<long long>(s.d), static_cast<long long>(PfCount(w)));
  }
  if (PfPresent(cos) != PfPresent(sin))
    return Fail(a, PF_ERR_SHAPE, "%s: expected both cos and sin or none", op);
  if (!PfPresent(cos)) return PF_OK;
  const int64_t count = s.batch * s.lk * (s.d / 2);
  if (s.d % 2 || PfCount(cos) != count || PfCount(sin) != count)
    return Fail(a, PF_ERR_SHAPE, "%s: expected cos and sin [B Lk, D/2] with B Lk = %lld and D = %lld", op,
                static_cast<long long>(s.batch * s.lk), static_cast<long long>(s.d));
  return PF_OK;
}

static inline int32_t AttentionCheck(const PfArgs* a, AttentionShape* s) {
  const char* op = "attention";
  if (int32_t e = AttentionFold(a, op, s)) return e;
  if (int32_t e = AttentionTurnCheck(a, op, *s)) return e;
  if (!PfSameDims(a->out[0], a->in[0]))
    return Fail(a, PF_ERR_SHAPE, "%s: expected o with the shape of q", op);
  if (PfPresent(a->out[1]) && PfCount(a->out[1]) != s->batch * s->heads * s->lq)
    return Fail(a, PF_ERR_SHAPE, "%s: expected lse [B, H, L]", op);
  return PF_OK;
}

static inline int32_t AttentionBackwardCheck(const PfArgs* a, AttentionShape* s) {
  const char* op = "attention_backward";
  if (int32_t e = AttentionFold(a, op, s)) return e;
  if (!PfSameDims(a->in[5], a->in[0]) || !PfSameDims(a->in[7], a->in[0]))
    return Fail(a, PF_ERR_SHAPE, "%s: expected o and do with the shape of q", op);
  if (PfCount(a->in[6]) != s->batch * s->heads * s->lq)
    return Fail(a, PF_ERR_SHAPE, "%s: expected lse [B, H, L]", op);
  if (!PfSameDims(a->out[0], a->in[0]) || !PfSameDims(a->out[1], a->in[1]) ||
      !PfSameDims(a->out[2], a->in[1]))
    return Fail(a, PF_ERR_SHAPE, "%s: expected dq, dk, dv with the shapes of q, k, v", op);
  return PF_OK;
}

// What the kernels take, which is less than what the reference does.
static inline int32_t AttentionRefuse(const PfArgs* a, const char* op, int f32_input, int f32_output) {
  for (int i = 0; i < a->n_in; ++i) {
    const PfView& v = a->in[i];
    if (i == 3 || i == 4 || !PfPresent(v)) continue;
    if (!PfIsFloat(v) || (i == f32_input && v.dtype != PF_F32))
      return Fail(a, PF_ERR_DTYPE, "%s: input %d has a dtype this op does not take", op, i);
  }
  for (int i = 0; i < a->n_out; ++i) {
    const PfView& v = a->out[i];
    if (PfPresent(v) && (!PfIsFloat(v) || (i == f32_output && v.dtype != PF_F32)))
      return Fail(a, PF_ERR_DTYPE, "%s: output %d has a dtype this op does not give", op, i);
  }
  return PF_OK;
}
static inline int32_t AttentionRefuseForward(const PfArgs* a) {
  if (int32_t e = AttentionRefuse(a, "attention", -1, 1)) return e;
  for (int i = 7; i < 9; ++i)
    if (PfPresent(AttentionInput(a, i)) && AttentionInput(a, i).dtype != PF_F32)
      return Fail(a, PF_ERR_DTYPE, "attention: expected cos and sin as f32");
  return PF_OK;
}
static inline int32_t AttentionRefuseBackward(const PfArgs* a) {
  return AttentionRefuse(a, "attention_backward", 6, -1);
}
