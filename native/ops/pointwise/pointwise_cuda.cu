#include "backends/cuda/activations.h"
#include "backends/cuda/sums.h"
#include "ops/pointwise/pointwise.h"

namespace {

struct Unary {
  int kind;
  float low, high;
  __device__ void operator()(int64_t, const float* in, float* out) const {
    const float x = in[0];
    float y;
    switch (kind) {
      case kSilu: y = Silu(x); break;
      case kGeluTanh: y = GeluTanh(x); break;
      case kExp: y = expf(x); break;
      case kClamp: y = x < low ? low : x > high ? high : x; break;
      case kSquare: y = x * x; break;
      case kSqrt: y = sqrtf(x); break;
      case kSigmoid: y = Sigmoid(x); break;
      case kTanh: y = tanhf(x); break;
      case kQuickGelu: y = x * Sigmoid(1.702f * x); break;
      default: y = x < 0 ? 0.0f : x;
    }
    out[0] = y;
  }
};

struct UnaryBackward {
  int kind;
  float low, high;
  __device__ void operator()(int64_t, const float* in, float* out) const {
    const float x = in[0];
    float d;
    switch (kind) {
      case kSilu: {
        const float s = Sigmoid(x);
        d = s * (1 + x * (1 - s));
        break;
      }
      case kGeluTanh: {
        // Beyond +-20 the slope is exactly 0 or 1, and x * x must not overflow into 0 * inf.
        const float c = x < -20 ? -20.0f : x > 20 ? 20.0f : x, s = GeluSigmoid(c);
        d = s + c * s * (1 - s) * kGeluScale * (1 + 3 * 0.044715f * c * c);
        break;
      }
      case kExp: d = expf(x); break;
      case kClamp: d = x >= low && x <= high ? 1.0f : 0.0f; break;
      case kSquare: d = 2 * x; break;
      case kSqrt: d = 0.5f / sqrtf(x); break;
      case kSigmoid: {
        const float s = Sigmoid(x);
        d = s * (1 - s);
        break;
      }
      case kTanh: {
        // 1 - tanh^2 = 4 s (1 - s) of the sigmoid at 2x: no cancellation at the flat ends.
        d = 4.0f * Sigmoid(2 * x) * Sigmoid(-2 * x);
        break;
      }
      case kQuickGelu: {
        const float s = Sigmoid(1.702f * x);
        d = s * (1 + 1.702f * x * (1 - s));
        break;
      }
      default: d = x > 0 ? 1.0f : 0.0f;
    }
    out[0] = d * in[1];
  }
};

__device__ __forceinline__ float Combine(int kind, float a, float b) {
  switch (kind) {
    case kAdd: return a + b;
    case kSub: return a - b;
    case kMul: return a * b;
    default: return a / b;
  }
}
struct BinaryAlike {
  int kind;
  __device__ void operator()(int64_t, const float* x, float* y) const { y[0] = Combine(kind, x[0], x[1]); }
};
struct BinaryBroadcast {
  int kind;
  FloatArray b;
  Broadcast shape;
  bool small;  // indices fit 32 bits, whose divisions are many times faster
  __device__ void operator()(int64_t i, const float* x, float* y) const {
    int64_t at = 0;
    if (small) {
      uint32_t rest = static_cast<uint32_t>(i);
      for (int k = 0; k < shape.rank; ++k) {
        const uint32_t next = rest / static_cast<uint32_t>(shape.dims[k]);
        at += (rest - next * static_cast<uint32_t>(shape.dims[k])) * shape.strides[k];
        rest = next;
      }
    } else {
      at = BroadcastIndex(shape, i);
    }
    y[0] = Combine(kind, x[0], ReadOne(b, at));
  }
};

struct Axpby {
  float alpha, beta, gamma;
  __device__ void operator()(int64_t, const float* x, float* y) const {
    y[0] = alpha * x[0] + beta * x[1] + gamma;
  }
};

// out = x + gate[rows] y, or without x the gradient gate[rows] y. N divides d.
template <int N>
__global__ void __launch_bounds__(kElementThreads)
    GatedKernel(FloatArray x, FloatArray y, FloatArray gate, const int32_t* rows, FloatArray out, int64_t n,
                int64_t d, int64_t entries, int32_t* faults) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  if (at >= n) return;
  const int64_t token = at / d;
  int64_t row = rows[token];
  if (row < 0 || row >= entries) {
    *faults = kFaultRows;
    row = 0;
  }
  float a[N], b[N], g[N];
  ReadPack<N>(x, at, a);
  ReadPack<N>(y, at, b);
  ReadPack<N>(gate, row * d + (at - token * d), g);
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] += g[i] * b[i];
  WritePack<N>(out, at, a);
}

int32_t Gated(const PfArgs* a, const FloatArray& x, const FloatArray& y, const FloatArray& out) {
  const PfView &gate = a->in[2], &rows = a->in[3];
  const int64_t d = gate.dims[1], n = PfCount(rows) * d;
  if (n == 0) return PF_OK;
  const FloatArray g = ArrayOf(gate);
  const bool packs = d % 8 == 0 && Packs(x) && Packs(y) && Packs(g) && Packs(out);
  const dim3 grid(static_cast<unsigned>(CeilDiv(n, static_cast<int64_t>(kElementThreads) * (packs ? 8 : 1))));
  return Launch(a, packs ? &GatedKernel<8> : &GatedKernel<1>, grid, kElementThreads, 0, x, y, g,
                PfData<int32_t>(rows), out, n, d, gate.dims[0], Faults(a));
}

struct GateTerm {
  FloatArray dout, y;
  const int32_t* rows;
  int64_t d;
  __device__ double operator()(int64_t entry, int64_t row, int64_t column) const {
    if (rows[row] != entry) return 0;
    const int64_t at = row * d + column;
    return static_cast<double>(ReadOne(dout, at)) * ReadOne(y, at);
  }
};
struct PutGate {
  FloatArray dgate;
  __device__ void operator()(int64_t i, double sum) const { WriteOne(dgate, i, static_cast<float>(sum)); }
};

}  // namespace

int32_t pf_cuda_unary(const PfArgs* a) {
  PF_TRY(CheckUnary(a, "unary"));
  PF_TRY(NeedFloat(a, "unary", "x", a->in[0]));
  PF_TRY(NeedFloat(a, "unary", "y", a->out[0]));
  const UnaryParams& p = PfParams<UnaryParams>(a);
  const FloatArrays<1, 1> arrays{{ArrayOf(a->in[0])}, {ArrayOf(a->out[0])}};
  return Elements(a, arrays, PfCount(a->in[0]),
                  Unary{static_cast<int>(p.kind), static_cast<float>(p.a), static_cast<float>(p.b)});
}

int32_t pf_cuda_unary_backward(const PfArgs* a) {
  PF_TRY(CheckUnary(a, "unary_backward"));
  PF_TRY(NeedFloat(a, "unary_backward", "x", a->in[0]));
  PF_TRY(NeedFloat(a, "unary_backward", "dy", a->in[1]));
  PF_TRY(NeedFloat(a, "unary_backward", "dx", a->out[0]));
  const UnaryParams& p = PfParams<UnaryParams>(a);
  const FloatArrays<2, 1> arrays{{ArrayOf(a->in[0]), ArrayOf(a->in[1])}, {ArrayOf(a->out[0])}};
  return Elements(a, arrays, PfCount(a->in[0]),
                  UnaryBackward{static_cast<int>(p.kind), static_cast<float>(p.a), static_cast<float>(p.b)});
}

int32_t pf_cuda_binary(const PfArgs* args) {
  const PfView &a = args->in[0], &b = args->in[1], &y = args->out[0];
  PF_TRY(CheckBinary(args));
  Broadcast shape;
  PF_TRY(MakeBroadcast(args, a, b, &shape));
  PF_TRY(NeedFloat(args, "binary", "a", a));
  PF_TRY(NeedFloat(args, "binary", "b", b));
  PF_TRY(NeedFloat(args, "binary", "y", y));
  const int kind = static_cast<int>(PfParams<BinaryParams>(args).kind);
  const int64_t n = PfCount(a);
  if (PfCount(b) == n) {
    const FloatArrays<2, 1> arrays{{ArrayOf(a), ArrayOf(b)}, {ArrayOf(y)}};
    return Elements(args, arrays, n, BinaryAlike{kind});
  }
  const FloatArrays<1, 1> arrays{{ArrayOf(a)}, {ArrayOf(y)}};
  return Elements(args, arrays, n, BinaryBroadcast{kind, ArrayOf(b), shape, n <= INT32_MAX});
}

int32_t pf_cuda_axpby(const PfArgs* args) {
  const PfView &a = args->in[0], &b = args->in[1], &y = args->out[0];
  PF_TRY(CheckAxpby(args));
  PF_TRY(NeedFloat(args, "axpby", "a", a));
  PF_TRY(NeedFloat(args, "axpby", "b", b));
  PF_TRY(NeedFloat(args, "axpby", "y", y));
  const AxpbyParams& p = PfParams<AxpbyParams>(args);
  const FloatArrays<2, 1> arrays{{ArrayOf(a), ArrayOf(b)}, {ArrayOf(y)}};
  const float beta = PfPresent(b) ? static_cast<float>(p.beta) : 0.0f;
  return Elements(args, arrays, PfCount(a),
                  Axpby{static_cast<float>(p.alpha), beta, static_cast<float>(p.gamma)});
}

int32_t pf_cuda_gated_add(const PfArgs* a) {
  PF_TRY(CheckGated(a, "gated_add"));
  PF_TRY(NeedGatedTypes(a));
  return Gated(a, ArrayOf(a->in[0]), ArrayOf(a->in[1]), ArrayOf(a->out[0]));
}

int32_t pf_cuda_gated_add_backward(const PfArgs* a) {
  PF_TRY(CheckGated(a, "gated_add_backward"));
  PF_TRY(NeedGatedBackwardTypes(a));
  const FloatArray dout = ArrayOf(a->in[0]);
  if (PfPresent(a->out[0])) PF_TRY(Gated(a, {nullptr, PF_F32}, dout, ArrayOf(a->out[0])));
  if (!PfPresent(a->out[1])) return PF_OK;
  const int64_t d = a->in[2].dims[1];
  return Sums(a, a->in[2].dims[0], PfCount(a->in[3]), d,
              GateTerm{dout, ArrayOf(a->in[1]), PfData<int32_t>(a->in[3]), d}, PutGate{ArrayOf(a->out[1])});
}
