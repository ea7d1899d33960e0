#include "ops/pointwise/blocks.h"
#include "ops/pointwise/pointwise.h"

namespace {

Vf GeluSigmoid(Vf x) { return Sigmoid(1.5957691216f * Fma(x * x * x, Set1(0.044715f), x)); }

void UnaryBlock(const UnaryParams& p, int64_t n, const float* x, float* y) {
  switch (static_cast<int>(p.kind)) {
    case kSilu: return Map(n, x, y, [](Vf v) { return Silu(v); });
    case kGeluTanh: return Map(n, x, y, [](Vf v) { return GeluTanh(v); });
    case kExp: return Map(n, x, y, [](Vf v) { return Exp(v); });
    case kClamp: {
      const Vf lo = Set1(static_cast<float>(p.a)), hi = Set1(static_cast<float>(p.b));
      return Map(n, x, y, [=](Vf v) { return v < lo ? lo : v > hi ? hi : v; });
    }
    case kSquare: return Map(n, x, y, [](Vf v) { return v * v; });
    case kSqrt: return Map(n, x, y, [](Vf v) { return Sqrt(v); });
    case kSigmoid: return Map(n, x, y, [](Vf v) { return Sigmoid(v); });
    case kTanh: return Map(n, x, y, [](Vf v) { return Tanh(v); });
    case kQuickGelu: return Map(n, x, y, [](Vf v) { return v * Sigmoid(1.702f * v); });
    default: return Map(n, x, y, [](Vf v) { return v < 0 ? (Vf){} : v; });
  }
}

void UnaryBackwardBlock(const UnaryParams& p, int64_t n, const float* x, const float* g, float* y) {
  switch (static_cast<int>(p.kind)) {
    case kSilu:
      return Map(n, x, g, y, [](Vf v, Vf d) {
        const Vf s = Sigmoid(v);
        return d * (s * (1.0f + v * (1.0f - s)));
      });
    case kGeluTanh:
      return Map(n, x, g, y, [](Vf v, Vf d) {
        // Beyond +-20 the slope is exactly 0 or 1, and v * v must not overflow into 0 * inf.
        const Vf c = Min(Max(v, Set1(-20)), Set1(20)), s = GeluSigmoid(c);
        const Vf slope = s + c * s * (1.0f - s) * (1.5957691216f * (1.0f + 0.134145f * c * c));
        return d * (v != v ? v : slope);
      });
    case kExp: return Map(n, x, g, y, [](Vf v, Vf d) { return d * Exp(v); });
    case kClamp: {
      const Vf lo = Set1(static_cast<float>(p.a)), hi = Set1(static_cast<float>(p.b));
      return Map(n, x, g, y, [=](Vf v, Vf d) { return (v >= lo) & (v <= hi) ? d : (Vf){}; });
    }
    case kSquare: return Map(n, x, g, y, [](Vf v, Vf d) { return d * (v + v); });
    case kSqrt: return Map(n, x, g, y, [](Vf v, Vf d) { return d * (0.5f / Sqrt(v)); });
    case kSigmoid:
      return Map(n, x, g, y, [](Vf v, Vf d) {
        const Vf s = Sigmoid(v);
        return d * s * (1.0f - s);
      });
    case kTanh:
      return Map(n, x, g, y, [](Vf v, Vf d) {
        // 1 - tanh^2 = 4 s (1 - s) of the sigmoid at 2v: no cancellation at the flat ends.
        const Vf s = Sigmoid(v + v), r = Sigmoid(-v - v);
        return d * (4.0f * s * r);
      });
    case kQuickGelu:
      return Map(n, x, g, y, [](Vf v, Vf d) {
        const Vf s = Sigmoid(1.702f * v);
        return d * (s * (1.0f + 1.702f * v * (1.0f - s)));
      });
    default: return Map(n, x, g, y, [](Vf v, Vf d) { return v > 0 ? d : (Vf){}; });
  }
}

// b's floats for a's flat range [at, at + n), walking the groups in runs of the innermost one.
const float* ReadBroadcast(const PfView& b, const Broadcast& shape, int64_t at, int64_t n, float* buffer) {
  const int64_t inner = shape.dims[0], step = shape.strides[0];
  if (step == 1 && at % inner + n <= inner) return ReadBlock(b, BroadcastIndex(shape, at), n, buffer);
  for (int64_t done = 0; done < n;) {
    const int64_t run = MinOf(n - done, inner - (at + done) % inner), from = BroadcastIndex(shape, at + done);
    if (step == 0) {
      float value;
      value = *ReadBlock(b, from, 1, &value);
      for (int64_t i = 0; i < run; ++i) buffer[done + i] = value;
    } else {
      const float* p = ReadBlock(b, from, run, buffer + done);
      if (p != buffer + done) memcpy(buffer + done, p, run * sizeof(float));
    }
    done += run;
  }
  return buffer;
}

// Walking down columns leaves a page with every row, where the hardware's own prefetching stops. Addresses
// past the end are harmless: a prefetch does not fault.
void Prefetch(const PfView& v, int64_t at, int64_t n) {
  const int64_t size = PfSize(v.dtype);
  const uintptr_t from = reinterpret_cast<uintptr_t>(v.data) + at * size;
  for (int64_t i = 0; i < n * size; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + i));
}

}  // namespace

int32_t pf_cpu_unary(const PfArgs* a) {
  PF_TRY(CheckUnary(a, "unary"));
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(NeedFloat(a, "unary", "x", x));
  PF_TRY(NeedFloat(a, "unary", "y", y));
  const UnaryParams& p = PfParams<UnaryParams>(a);
  ForBlocks(PfCount(x), [&](int64_t at, int64_t n) {
    alignas(64) float bx[kBlock], by[kBlock];
    float* out = BeginWrite(y, at, by);
    UnaryBlock(p, n, ReadBlock(x, at, n, bx), out);
    EndWrite(y, at, n, out);
  });
  return PF_OK;
}

int32_t pf_cpu_unary_backward(const PfArgs* a) {
  PF_TRY(CheckUnary(a, "unary_backward"));
  const PfView &x = a->in[0], &dy = a->in[1], &dx = a->out[0];
  PF_TRY(NeedFloat(a, "unary_backward", "x", x));
  PF_TRY(NeedFloat(a, "unary_backward", "dy", dy));
  PF_TRY(NeedFloat(a, "unary_backward", "dx", dx));
  const UnaryParams& p = PfParams<UnaryParams>(a);
  ForBlocks(PfCount(x), [&](int64_t at, int64_t n) {
    alignas(64) float bx[kBlock], bg[kBlock], by[kBlock];
    float* out = BeginWrite(dx, at, by);
    UnaryBackwardBlock(p, n, ReadBlock(x, at, n, bx), ReadBlock(dy, at, n, bg), out);
    EndWrite(dx, at, n, out);
  });
  return PF_OK;
}

int32_t pf_cpu_binary(const PfArgs* args) {
  PF_TRY(CheckBinary(args));
  const PfView &a = args->in[0], &b = args->in[1], &y = args->out[0];
  PF_TRY(NeedFloat(args, "binary", "a", a));
  PF_TRY(NeedFloat(args, "binary", "b", b));
  PF_TRY(NeedFloat(args, "binary", "y", y));
  Broadcast shape;
  PF_TRY(MakeBroadcast(args, a, b, &shape));
  const int kind = static_cast<int>(PfParams<BinaryParams>(args).kind);
  ForBlocks(PfCount(a), [&](int64_t at, int64_t n) {
    alignas(64) float ba[kBlock], bb[kBlock], by[kBlock];
    float* out = BeginWrite(y, at, by);
    const float *pa = ReadBlock(a, at, n, ba), *pb = ReadBroadcast(b, shape, at, n, bb);
    switch (kind) {
      case kAdd: Map(n, pa, pb, out, [](Vf u, Vf v) { return u + v; }); break;
      case kSub: Map(n, pa, pb, out, [](Vf u, Vf v) { return u - v; }); break;
      case kMul: Map(n, pa, pb, out, [](Vf u, Vf v) { return u * v; }); break;
      default: Map(n, pa, pb, out, [](Vf u, Vf v) { return u / v; });
    }
    EndWrite(y, at, n, out);
  });
  return PF_OK;
}

int32_t pf_cpu_axpby(const PfArgs* args) {
  PF_TRY(CheckAxpby(args));
  const PfView &a = args->in[0], &b = args->in[1], &y = args->out[0];
  PF_TRY(NeedFloat(args, "axpby", "a", a));
  PF_TRY(NeedFloat(args, "axpby", "b", b));
  PF_TRY(NeedFloat(args, "axpby", "y", y));
  const AxpbyParams& p = PfParams<AxpbyParams>(args);
  const float alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
  const float gamma = static_cast<float>(p.gamma);
  const bool has_b = PfPresent(b);
  ForBlocks(PfCount(a), [&](int64_t at, int64_t n) {
    alignas(64) float ba[kBlock], bb[kBlock], by[kBlock];
    float* out = BeginWrite(y, at, by);
    const float* pa = ReadBlock(a, at, n, ba);
    if (has_b)
      Map(n, pa, ReadBlock(b, at, n, bb), out, [=](Vf u, Vf v) { return alpha * u + beta * v + gamma; });
    else
      Map(n, pa, out, [=](Vf u) { return alpha * u + gamma; });
    EndWrite(y, at, n, out);
  });
  return PF_OK;
}

int32_t pf_cpu_gated_add(const PfArgs* a) {
  PF_TRY(CheckGated(a, "gated_add"));
  PF_TRY(CheckGatedRows(a, "gated_add"));
  const PfView &x = a->in[0], &y = a->in[1], &gate = a->in[2], &out = a->out[0];
  PF_TRY(NeedGatedTypes(a));
  PF_TRY(NeedSameDims(a, "gated_add", "out", x, out));
  const int32_t* rows = PfData<int32_t>(a->in[3]);
  const int64_t d = gate.dims[1], n = PfCount(a->in[3]);
  ForTasks(n, n * d, [&](int64_t row) {
    alignas(64) float bx[kBlock], by[kBlock], bg[kBlock], bo[kBlock];
    for (int64_t c = 0; c < d; c += kBlock) {
      const int64_t at = row * d + c, m = MinOf(kBlock, d - c);
      float* p = BeginWrite(out, at, bo);
      Map(m, ReadBlock(x, at, m, bx), ReadBlock(gate, rows[row] * d + c, m, bg), ReadBlock(y, at, m, by), p,
          [](Vf u, Vf g, Vf v) { return Fma(g, v, u); });
      EndWrite(out, at, m, p);
    }
  });
  return PF_OK;
}

int32_t pf_cpu_gated_add_backward(const PfArgs* a) {
  PF_TRY(CheckGated(a, "gated_add_backward"));
  PF_TRY(CheckGatedRows(a, "gated_add_backward"));
  const PfView &dout = a->in[0], &y = a->in[1], &gate = a->in[2], &dy = a->out[0], &dgate = a->out[1];
  PF_TRY(NeedGatedBackwardTypes(a));
  const int32_t* rows = PfData<int32_t>(a->in[3]);
  const int64_t d = gate.dims[1], n = PfCount(a->in[3]), groups = gate.dims[0];
  if (PfPresent(dy)) {
    PF_TRY(NeedSameDims(a, "gated_add_backward", "dy", dout, dy));
    ForTasks(n, n * d, [&](int64_t row) {
      alignas(64) float bd[kBlock], bg[kBlock], bo[kBlock];
      for (int64_t c = 0; c < d; c += kBlock) {
        const int64_t at = row * d + c, m = MinOf(kBlock, d - c);
        float* p = BeginWrite(dy, at, bo);
        Map(m, ReadBlock(dout, at, m, bd), ReadBlock(gate, rows[row] * d + c, m, bg), p,
            [](Vf u, Vf g) { return u * g; });
        EndWrite(dy, at, m, p);
      }
    });
  }
  if (!PfPresent(dgate)) return PF_OK;
  PF_TRY(NeedSameDims(a, "gated_add_backward", "dgate", gate, dgate));
  // Threads own columns, so every sum has one order. Runs of equal rows are added up on their own first: long
  // sums then lose few bits.
  constexpr int64_t kColumns = 128, kRun = 64;
  float* total = static_cast<float*>(a->context->scratch(a->context, groups * d * sizeof(float)));
  if (!total && groups * d > 0) return Fail(a, PF_ERR_MEMORY, "gated_add_backward: no scratch memory");
  memset(total, 0, groups * d * sizeof(float));
  ForTasks((d + kColumns - 1) / kColumns, n * d, [&](int64_t task) {
    alignas(64) float bd[kColumns], by[kColumns], run[kColumns];
    const int64_t c = task * kColumns, m = MinOf(kColumns, d - c);
    for (int64_t row = 0; row < n;) {
      memset(run, 0, sizeof(run));
      const int64_t first = row;
      for (; row < n && row < first + kRun && rows[row] == rows[first]; ++row) {
        Prefetch(dout, (row + 4) * d + c, m);
        Prefetch(y, (row + 4) * d + c, m);
        Map(m, run, ReadBlock(dout, row * d + c, m, bd), ReadBlock(y, row * d + c, m, by), run,
            [](Vf t, Vf u, Vf v) { return Fma(u, v, t); });
      }
      float* sum = total + rows[first] * d + c;
      Map(m, sum, run, sum, [](Vf u, Vf v) { return u + v; });
    }
    for (int64_t r = 0; r < groups; ++r) {
      const int64_t at = r * d + c;
      if (dgate.dtype == PF_F32) memcpy(PfData<float>(dgate) + at, total + at, m * sizeof(float));
      EndWrite(dgate, at, m, total + at);
    }
  });
  return PF_OK;
}
