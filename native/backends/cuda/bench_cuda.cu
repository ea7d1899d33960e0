// What this device can do without pyraflow: the ceilings that `npm run bench -- --device cuda` compares the
// engine with. Called on an engine thread between two commands; names as in backends/cpu/bench.cc.
#include <chrono>
#include <initializer_list>

#include "backends/cuda/cublaslt.h"
#include "backends/cuda/elementwise.h"
#include "backends/cuda/mma.h"

namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A call as kernels get it, without an engine.
struct Call {
  PfContext context{};  // first: scratch finds the call by it
  PfArgs args{nullptr, nullptr, nullptr, 0, 0, 0, &context};
  void* workspace = nullptr;
  Call() {
    context.stream = CurrentStream();
    context.scratch = [](PfContext* self, size_t bytes) -> void* {
      // The one block that a product asks for is kept from run to run.
      Call* const call = reinterpret_cast<Call*>(self);
      if (!call->workspace) call->workspace = kDeviceMemory.allocate(bytes);
      return call->workspace;
    };
  }
  ~Call() {
    if (workspace) kDeviceMemory.release(workspace);
  }
};

// Mean seconds of a run; negative when a launch fails. Enough is queued at once that the queue never runs
// dry.
template <class Body>
double SecondsPerRun(double seconds, const Body& body) {
  char error[256];
  if (body() != PF_OK || kDeviceMemory.synchronize(error) != PF_OK) return -1;
  int64_t runs = 0, batch = 1;
  const double begin = Now();
  double elapsed = 0;
  while (elapsed < seconds) {
    for (int64_t i = 0; i < batch; ++i)
      if (body() != PF_OK) return -1;
    if (kDeviceMemory.synchronize(error) != PF_OK) return -1;
    runs += batch;
    elapsed = Now() - begin;
    batch = batch < 64 ? 2 * batch : batch;
  }
  return elapsed / static_cast<double>(runs);
}

constexpr int kThreads = 256, kRounds = 2048, kChains = 8;

// Two blocks for every multiprocessor.
int Blocks() {
  int count = 132;
#if defined(__CUDACC__)
  int device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
#endif
  return 2 * count;
}

// Numbers that differ: a device multiplies zeros with less power, and so faster.
__global__ void __launch_bounds__(kThreads) Scatter(FloatArray x, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const uint32_t bits = (static_cast<uint32_t>(i) * 2654435761u) >> 8;
  if (i < n) WriteOne(x, i, static_cast<float>(bits) * 1.1920929e-7f - 1);
}

__global__ void __launch_bounds__(kThreads) TensorLoop(float* out) {
  float d[kChains][4] = {};
  const uint32_t bits = 0x3f803f80u + threadIdx.x;
  const uint32_t a[4] = {bits, bits, bits, bits}, b[2] = {bits, bits};
  for (int i = 0; i < kRounds; ++i)
#pragma unroll
    for (int k = 0; k < kChains; ++k) MmaBf16(d[k], a, b);
  float sum = 0;
  for (int k = 0; k < kChains; ++k) sum += d[k][0] + d[k][1] + d[k][2] + d[k][3];
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) FloatLoop(float* out) {
  float d[kChains * 2];
  const float a = 0.999f, b = 1e-3f * static_cast<float>(threadIdx.x);
#pragma unroll
  for (int k = 0; k < kChains * 2; ++k) d[k] = static_cast<float>(k);
  for (int i = 0; i < kRounds; ++i)
#pragma unroll
    for (int k = 0; k < kChains * 2; ++k) d[k] = fmaf(d[k], a, b);
  float sum = 0;
  for (int k = 0; k < kChains * 2; ++k) sum += d[k];
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

}  // namespace

// GB/s, read plus written, of the driver's own copy of `bytes` from one place of the device to another.
PF_EXPORT double pf_bench_copy(int64_t bytes, double seconds) {
  Call call;
  void *const from = kDeviceMemory.allocate(bytes), *const to = kDeviceMemory.allocate(bytes);
  double rate = 0;
  if (from && to) {
    const double each = SecondsPerRun(seconds, [&] { return DeviceCopy(&call.args, to, from, bytes); });
    rate = each > 0 ? 2e-9 * static_cast<double>(bytes) / each : 0;
  }
  if (from) kDeviceMemory.release(from);
  if (to) kDeviceMemory.release(to);
  return rate;
}

// GFLOP/s out of registers: mma.sync for bf16, fused multiply-adds for f32. Newer instructions may be faster.
PF_EXPORT double pf_bench_multiply_add(int32_t dtype, double seconds) {
  Call call;
  void* const out = kDeviceMemory.allocate(sizeof(float) * Blocks() * kThreads);
  if (!out) return 0;
  const bool tensor = dtype == PF_BF16;
  const double each = SecondsPerRun(seconds, [&] {
    return Launch(&call.args, tensor ? &TensorLoop : &FloatLoop, Blocks(), kThreads, 0,
                  static_cast<float*>(out));
  });
  kDeviceMemory.release(out);
  const double per_thread = tensor ? 2.0 * 16 * 8 * 16 / 32 * kChains : 2.0 * kChains * 2;
  return each > 0 ? 1e-9 * per_thread * kRounds * Blocks() * kThreads / each : 0;
}

// GFLOP/s of cuBLASLt alone for x[m, k] w[n, k]T; 0 where it is not installed.
PF_EXPORT double pf_bench_matmul(int64_t m, int64_t n, int64_t k, int32_t dtype, double seconds) {
  Call call;
  const size_t size = PfSize(dtype);
  void *const x = kDeviceMemory.allocate(m * k * size), *const w = kDeviceMemory.allocate(n * k * size),
              *const y = kDeviceMemory.allocate(m * n * size);
  double each = -1;
  const auto scatter = [&](void* to, int64_t count) {
    return Launch(&call.args, &Scatter, dim3(static_cast<unsigned>(CeilDiv(count, kThreads))), kThreads, 0,
                  FloatArray{to, dtype}, count);
  };
  if (x && w && y && scatter(x, m * k) == PF_OK && scatter(w, n * k) == PF_OK) {
    const PfView none = {nullptr, 0, -1, {}};
    const PfView a = {x, dtype, 2, {m, k}}, b = {w, dtype, 2, {n, k}}, c = {y, dtype, 2, {m, n}};
    const GemmProblem p = {1, m, n, k, 0, 0, false, true, a, b, none, none, c, kActNone, false};
    each = SecondsPerRun(seconds, [&] {
      return CublasLtMatmul(&call.args, p, dtype, {x, k, 0}, {w, k, 0}) ? PF_OK : PF_ERR_DEVICE;
    });
  }
  for (void* block : {x, w, y})
    if (block) kDeviceMemory.release(block);
  return each > 0 ? 2e-9 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / each
                  : 0;
}
