#include "backends/ref/ref.h"
#include "ops/pointwise/pointwise.h"

namespace {

constexpr double kGeluScale = 1.5957691216057308;  // 2 sqrt(2 / pi)

double SigmoidOf(double x) { return 1 / (1 + exp(-x)); }

double Unary(const UnaryParams& p, double x) {
  switch (static_cast<int>(p.kind)) {
    case kSilu: return x * SigmoidOf(x);
    case kGeluTanh: return x * SigmoidOf(kGeluScale * (x + 0.044715 * x * x * x));
    case kExp: return exp(x);
    case kClamp: return x < p.a ? p.a : x > p.b ? p.b : x;
    case kSquare: return x * x;
    case kSqrt: return sqrt(x);
    case kSigmoid: return SigmoidOf(x);
    case kTanh: return tanh(x);
    case kQuickGelu: return x * SigmoidOf(1.702 * x);
    default: return x < 0 ? 0 : x;
  }
}

double UnaryDerivative(const UnaryParams& p, double x) {
  switch (static_cast<int>(p.kind)) {
    case kSilu: {
      const double s = SigmoidOf(x);
      return s * (1 + x * (1 - s));
    }
    case kGeluTanh: {
      const double s = SigmoidOf(kGeluScale * (x + 0.044715 * x * x * x));
      return s + x * s * (1 - s) * kGeluScale * (1 + 3 * 0.044715 * x * x);
    }
    case kExp: return exp(x);
    case kClamp: return x >= p.a && x <= p.b;
    case kSquare: return 2 * x;
    case kSqrt: return 0.5 / sqrt(x);
    case kSigmoid: return SigmoidOf(x) * (1 - SigmoidOf(x));
    case kTanh: return 1 - tanh(x) * tanh(x);
    case kQuickGelu: {
      const double s = SigmoidOf(1.702 * x);
      return s * (1 + 1.702 * x * (1 - s));
    }
    default: return x > 0;
  }
}

}  // namespace

int32_t pf_ref_unary(const PfArgs* a) {
  PF_TRY(CheckUnary(a, "unary"));
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i)
    Set(a->out[0], i, Unary(PfParams<UnaryParams>(a), Get(a->in[0], i)));
  return PF_OK;
}

int32_t pf_ref_unary_backward(const PfArgs* a) {
  PF_TRY(CheckUnary(a, "unary_backward"));
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i)
    Set(a->out[0], i, UnaryDerivative(PfParams<UnaryParams>(a), Get(a->in[0], i)) * Get(a->in[1], i));
  return PF_OK;
}

int32_t pf_ref_binary(const PfArgs* a) {
  PF_TRY(CheckBinary(a));
  Broadcast shape;
  PF_TRY(MakeBroadcast(a, a->in[0], a->in[1], &shape));
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i) {
    const double x = Get(a->in[0], i), b = Get(a->in[1], BroadcastIndex(shape, i));
    switch (static_cast<int>(PfParams<BinaryParams>(a).kind)) {
      case kAdd: Set(a->out[0], i, x + b); break;
      case kSub: Set(a->out[0], i, x - b); break;
      case kMul: Set(a->out[0], i, x * b); break;
      default: Set(a->out[0], i, x / b);
    }
  }
  return PF_OK;
}

int32_t pf_ref_axpby(const PfArgs* a) {
  PF_TRY(CheckAxpby(a));
  const AxpbyParams& p = PfParams<AxpbyParams>(a);
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i) {
    const double b = PfPresent(a->in[1]) ? p.beta * Get(a->in[1], i) : 0;
    Set(a->out[0], i, p.alpha * Get(a->in[0], i) + b + p.gamma);
  }
  return PF_OK;
}

int32_t pf_ref_gated_add(const PfArgs* a) {
  PF_TRY(CheckGated(a, "gated_add"));
  PF_TRY(CheckGatedRows(a, "gated_add"));
  const int64_t d = a->in[2].dims[1];
  for (int64_t i = 0; i < PfCount(a->in[0]); ++i) {
    const double gate = Get(a->in[2], static_cast<int64_t>(Get(a->in[3], i / d)) * d + i % d);
    Set(a->out[0], i, Get(a->in[0], i) + gate * Get(a->in[1], i));
  }
  return PF_OK;
}

int32_t pf_ref_gated_add_backward(const PfArgs* a) {
  PF_TRY(CheckGated(a, "gated_add_backward"));
  PF_TRY(CheckGatedRows(a, "gated_add_backward"));
  const int64_t d = a->in[2].dims[1], n = PfCount(a->in[3]);
  if (PfPresent(a->out[0]))
    for (int64_t i = 0; i < n * d; ++i)
      Set(a->out[0], i,
          Get(a->in[0], i) * Get(a->in[2], static_cast<int64_t>(Get(a->in[3], i / d)) * d + i % d));
  if (!PfPresent(a->out[1])) return PF_OK;
  for (int64_t r = 0; r < a->in[2].dims[0]; ++r) {
    for (int64_t c = 0; c < d; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i)
        if (Get(a->in[3], i) == r) sum += Get(a->in[0], i * d + c) * Get(a->in[1], i * d + c);
      Set(a->out[1], r * d + c, sum);
    }
  }
  return PF_OK;
}
