// Softmax attention without an L x L matrix; masks are two integers per token.
//
// attention [q[B,L,H,D], k[B,Lk,H,D], v[B,Lk,H,D], segment? i32[B,L], order? i32[B,L]] -> [o[B,L,H,D], lse
// f32[B,H,L]]
//   i sees j iff segment[i] == segment[j] and order[i] >= order[j]; both absent: everything (then Lk may
//   differ from L) s = scale * q_i . k_j,  lse_i = log sum_j exp(s_ij),  o_i = sum_j exp(s_ij - lse_i) v_j
//   over the visible j a row that sees nothing gives o = 0 and lse = -inf
// attention_backward [q, k, v, segment?, order?, o, lse, do] -> [dq, dk, dv]
//   p = exp(s - lse), ds = p (do_i . v_j - do_i . o_i);  dv_j = sum p do_i, dk_j = scale sum ds q_i, dq_i =
//   scale sum ds k_j
#pragma once
#include "core/check.h"

struct AttentionParams {
  double scale;
};

struct AttentionShape {
  int64_t batch = 0, lq = 0, lk = 0, heads = 0, d = 0;
  bool masked = false;
};

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
  if (s->lk != s->lq)
    return Fail(a, PF_ERR_SHAPE,
                "%s: expected k as long as q beside segment and order: L = %lld, received %lld", op,
                static_cast<long long>(s->lq), static_cast<long long>(s->lk));
  if (segment.dtype != PF_I32 || order.dtype != PF_I32)
    return Fail(a, PF_ERR_DTYPE, "%s: expected segment and order as i32", op);
  if (PfCount(segment) != s->batch * s->lq || PfCount(order) != s->batch * s->lq)
    return Fail(a, PF_ERR_SHAPE, "%s: expected segment and order [B, L] with B = %lld and L = %lld", op,
                static_cast<long long>(s->batch), static_cast<long long>(s->lq));
  return PF_OK;
}

static inline int32_t AttentionCheck(const PfArgs* a, AttentionShape* s) {
  const char* op = "attention";
  if (int32_t e = AttentionFold(a, op, s)) return e;
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
