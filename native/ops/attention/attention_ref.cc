#include "backends/ref/ref.h"
#include "ops/attention/attention.h"

namespace {

struct Judge {
  const PfArgs* a;
  AttentionShape s;
  double scale;

  int64_t Q(int64_t b, int64_t h, int64_t i) const { return ((b * s.lq + i) * s.heads + h) * s.d; }
  int64_t K(int64_t b, int64_t h, int64_t j) const { return ((b * s.lk + j) * s.heads + h) * s.d; }
  bool Sees(int64_t b, int64_t i, int64_t j) const {
    if (!s.masked) return true;
    const PfView &segment = a->in[3], &order = a->in[4];
    return Get(segment, b * s.lk + i) == Get(segment, b * s.lk + j) &&
           Get(order, b * s.lk + i) >= Get(order, b * s.lk + j);
  }
  double Dot(const PfView& x, int64_t at_x, const PfView& y, int64_t at_y) const {
    double sum = 0;
    for (int64_t c = 0; c < s.d; ++c) sum += Get(x, at_x + c) * Get(y, at_y + c);
    return sum;
  }
};

// x normalised and rotated, in double precision.
PfView Turned(const PfArgs* a, const AttentionShape& s, int which, double* to) {
  const PfView x = a->in[which], w = AttentionInput(a, 5 + which), cos = AttentionInput(a, 7),
               sin = AttentionInput(a, 8);
  const AttentionNormParams& params = PfParams<AttentionNormParams>(a);
  const int64_t length = x.dims[1];
  for (int64_t row = 0; row < s.batch * length * s.heads; ++row) {
    const int64_t i = row / s.heads % length, n = row / s.heads / length * s.lk + i;
    const bool second = PfPresent(w) && PfCount(w) == 2 * s.d && i >= params.split;
    double square = 0;
    for (int64_t c = 0; c < s.d; ++c) square += Get(x, row * s.d + c) * Get(x, row * s.d + c);
    for (int64_t c = 0; c < s.d; ++c) {
      double& t = to[row * s.d + c];
      t = Get(x, row * s.d + c);
      if (PfPresent(w)) t *= Get(w, second * s.d + c) / sqrt(square / s.d + params.eps);
    }
    for (int64_t c = 0; PfPresent(cos) && c < s.d / 2; ++c) {
      double* pair = to + row * s.d + 2 * c;
      const double even = pair[0], odd = pair[1];
      const double co = Get(cos, n * (s.d / 2) + c), si = Get(sin, n * (s.d / 2) + c);
      pair[0] = even * co - odd * si;
      pair[1] = even * si + odd * co;
    }
  }
  PfView view = x;
  view.data = to;
  view.dtype = PF_F64;
  return view;
}

}  // namespace

int32_t pf_ref_attention(const PfArgs* a) {
  Judge judge{a, {}, PfParams<AttentionParams>(a).scale};
  AttentionShape& s = judge.s;
  if (int32_t e = AttentionCheck(a, &s)) return e;
  PfArgs turned = *a;
  PfView inputs[5] = {a->in[0], a->in[1], a->in[2], a->in[3], a->in[4]};
  if (AttentionTurns(a)) {
    const int64_t queries = PfCount(a->in[0]), all = queries + PfCount(a->in[1]);
    double* rows = static_cast<double*>(a->context->scratch(a->context, (all + 1) * sizeof(double)));
    if (!rows) return Fail(a, PF_ERR_MEMORY, "attention: no scratch memory left");
    for (int i = 0; i < 2; ++i) inputs[i] = Turned(a, s, i, rows + i * queries);
    turned.in = inputs;
    a = judge.a = &turned;
  }
  double* p = static_cast<double*>(a->context->scratch(a->context, (s.lk + 1) * sizeof(double)));
  if (!p) return Fail(a, PF_ERR_MEMORY, "attention: no scratch memory left");
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.lq; ++i) {
        const int64_t qi = judge.Q(b, h, i);
        double max = -INFINITY, sum = 0;
        for (int64_t j = 0; j < s.lk; ++j) {
          p[j] = -INFINITY;
          if (judge.Sees(b, i, j)) p[j] = judge.scale * judge.Dot(a->in[0], qi, a->in[1], judge.K(b, h, j));
          max = fmax(max, p[j]);
        }
        for (int64_t j = 0; j < s.lk; ++j) {
          p[j] = max > -INFINITY ? exp(p[j] - max) : 0;
          sum += p[j];
        }
        if (PfPresent(a->out[1]))
          Set(a->out[1], (b * s.heads + h) * s.lq + i, sum > 0 ? max + log(sum) : -INFINITY);
        for (int64_t c = 0; c < s.d; ++c) {
          double o = 0;
          for (int64_t j = 0; j < s.lk; ++j)
            if (p[j] > 0) o += p[j] / sum * Get(a->in[2], judge.K(b, h, j) + c);
          Set(a->out[0], qi + c, o);
        }
      }
  return PF_OK;
}

int32_t pf_ref_attention_backward(const PfArgs* a) {
  Judge judge{a, {}, PfParams<AttentionParams>(a).scale};
  AttentionShape& s = judge.s;
  if (int32_t e = AttentionBackwardCheck(a, &s)) return e;
  const PfView &q = a->in[0], &k = a->in[1], &v = a->in[2], &o = a->in[5], &lse = a->in[6], &dout = a->in[7];
  const PfView &dq = a->out[0], &dk = a->out[1], &dv = a->out[2];
  for (int64_t i = 0; i < PfCount(dq); ++i) Set(dq, i, 0);
  for (int64_t i = 0; i < PfCount(dk); ++i) {
    Set(dk, i, 0);
    Set(dv, i, 0);
  }
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t h = 0; h < s.heads; ++h)
      for (int64_t i = 0; i < s.lq; ++i) {
        const int64_t qi = judge.Q(b, h, i);
        const double delta = judge.Dot(dout, qi, o, qi);
        for (int64_t j = 0; j < s.lk; ++j) {
          if (!judge.Sees(b, i, j)) continue;
          const int64_t kj = judge.K(b, h, j);
          const double p =
              exp(judge.scale * judge.Dot(q, qi, k, kj) - Get(lse, (b * s.heads + h) * s.lq + i));
          const double ds = p * (judge.Dot(dout, qi, v, kj) - delta) * judge.scale;
          for (int64_t c = 0; c < s.d; ++c) {
            Set(dq, qi + c, Get(dq, qi + c) + ds * Get(k, kj + c));
            Set(dk, kj + c, Get(dk, kj + c) + ds * Get(q, qi + c));
            Set(dv, kj + c, Get(dv, kj + c) + p * Get(dout, qi + c));
          }
        }
      }
  return PF_OK;
}
