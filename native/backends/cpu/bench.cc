// What this machine can do without pyraflow: the ceilings that `npm run bench` compares the engine with. They
// go round the door of onednn.h on purpose: the ceiling is oneDNN as its manual says to use it, one primitive
// for the whole problem with all threads, its own choice of weight layout, packed before the clock starts.
#include <omp.h>
#include <oneapi/dnnl/dnnl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <chrono>
#include <memory>

#include "backends/cpu/simd.h"

namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct FreeMemory {
  void operator()(void* p) const { free(p); }
};
using Block = std::unique_ptr<void, FreeMemory>;

// Huge pages where the engine's allocator asks for them too: the other side may not lose by its memory.
Block Allocate(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* memory = aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory && alignment == kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
  return Block(memory);
}

// Destroys whatever was made, in any order the function ends.
struct Product {
  dnnl_engine_t engine = nullptr;
  dnnl_stream_t stream = nullptr;
  dnnl_primitive_desc_t description = nullptr;
  dnnl_primitive_t primitive = nullptr;
  dnnl_memory_t a = nullptr, b = nullptr, c = nullptr;
  ~Product() {
    for (dnnl_memory_t memory : {a, b, c})
      if (memory) dnnl_memory_destroy(memory);
    if (primitive) dnnl_primitive_destroy(primitive);
    if (description) dnnl_primitive_desc_destroy(description);
    if (stream) dnnl_stream_destroy(stream);
    if (engine) dnnl_engine_destroy(engine);
  }
};

// count values in (-1, 1), or of eight bits; zeros would let some processors clock higher than real data
// does.
void FillValues(void* data, int64_t count, int32_t dtype, uint32_t seed) {
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float x = static_cast<float>(seed >> 8) / 8388608.0f - 1;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (dtype == PF_I8)
      static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(seed >> 24);
    else if (dtype == PF_BF16)
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits >> 16);
    else
      static_cast<float*>(data)[i] = x;
  }
}

// Runs body until `seconds` have passed, after one untimed run; the mean time of a run.
template <class Body>
double SecondsPerRun(double seconds, const Body& body) {
  body();
  const double begin = Now();
  int64_t runs = 0;
  double end;
  do {
    body();
    ++runs;
    end = Now();
  } while (end - begin < seconds);
  return (end - begin) / static_cast<double>(runs);
}

}  // namespace

// GFLOP/s of y[m, n] = x[m, k] w[n, k]^T with x, w and y of one dtype (f32 or bf16), or x and w i8 and y i32;
// negative when oneDNN refuses.
PF_EXPORT double pf_bench_matmul(int64_t m, int64_t n, int64_t k, int32_t dtype, double seconds) {
  const size_t size = PfSize(dtype), result = dtype == PF_I8 ? 4 : size;
  const dnnl_data_type_t type = dtype == PF_I8 ? dnnl_s8 : dtype == PF_BF16 ? dnnl_bf16 : dnnl_f32;
  Product p;
  if (dnnl_engine_create(&p.engine, dnnl_cpu, 0) != dnnl_success) return -1;
  if (dnnl_stream_create(&p.stream, p.engine, dnnl_stream_default_flags) != dnnl_success) return -1;

  dnnl_memory_desc_t a, b, c;
  const dnnl_dims_t a_dims = {m, k}, b_dims = {k, n}, c_dims = {m, n};
  dnnl_memory_desc_init_by_tag(&a, 2, a_dims, type, dnnl_ab);
  dnnl_memory_desc_init_by_tag(&b, 2, b_dims, type, dnnl_format_tag_any);
  dnnl_memory_desc_init_by_tag(&c, 2, c_dims, dtype == PF_I8 ? dnnl_s32 : type, dnnl_ab);
  dnnl_matmul_desc_t desc;
  if (dnnl_matmul_desc_init(&desc, &a, &b, nullptr, &c) != dnnl_success) return -1;
  if (dnnl_primitive_desc_create(&p.description, &desc, nullptr, p.engine, nullptr) != dnnl_success)
    return -1;
  if (dnnl_primitive_create(&p.primitive, p.description) != dnnl_success) return -1;
  const dnnl_memory_desc_t packed = *dnnl_primitive_desc_query_md(p.description, dnnl_query_weights_md, 0);

  // The layout only orders the weights, so the packed buffer can be filled as it is.
  const size_t packed_bytes = dnnl_memory_desc_get_size(&packed);
  const Block x = Allocate(m * k * size), w = Allocate(packed_bytes), y = Allocate(m * n * result);
  if (!x || !w || !y) return -1;
  FillValues(x.get(), m * k, dtype, 1);
  FillValues(w.get(), static_cast<int64_t>(packed_bytes / size), dtype, 2);
  memset(y.get(), 0, m * n * result);
  if (dnnl_memory_create(&p.a, &a, p.engine, x.get()) != dnnl_success) return -1;
  if (dnnl_memory_create(&p.b, &packed, p.engine, w.get()) != dnnl_success) return -1;
  if (dnnl_memory_create(&p.c, &c, p.engine, y.get()) != dnnl_success) return -1;
  const dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, p.a}, {DNNL_ARG_WEIGHTS, p.b}, {DNNL_ARG_DST, p.c}};
  bool sound = true;
  const double each = SecondsPerRun(seconds, [&] {
    sound &= dnnl_primitive_execute(p.primitive, p.stream, 3, arguments) == dnnl_success;
    dnnl_stream_wait(p.stream);
  });
  return sound ? 2e-9 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / each : -1;
}

// GB/s (read plus written) of memcpy, one contiguous share a thread.
PF_EXPORT double pf_bench_copy(int64_t bytes, double seconds) {
  const Block from = Allocate(bytes), to = Allocate(bytes);
  if (!from || !to || bytes <= 0) return -1;
  memset(from.get(), 1, bytes);
  memset(to.get(), 2, bytes);
  const char* source = static_cast<const char*>(from.get());
  char* target = static_cast<char*>(to.get());
  const double each = SecondsPerRun(seconds, [&] {
#pragma omp parallel
    {
      const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
      const int64_t begin = bytes * thread / threads / 64 * 64;
      const int64_t end = thread + 1 == threads ? bytes : bytes * (thread + 1) / threads / 64 * 64;
      memcpy(target + begin, source + begin, end - begin);
    }
  });
  return 2e-9 * static_cast<double>(bytes) / each;
}

namespace {

// Multiply-adds on registers alone: 12 independent sums keep two units of 5 cycles' latency busy.
template <class Step>
float Spin(int64_t rounds, Step step) {
  Vf sum[12] = {}, x = Set1(0.5f), y = Set1(1e-8f);
  for (Vf& s : sum)
    __asm__ volatile("" : "+" PF_VECTOR_REGISTER(s));  // twelve equal sums would be computed once
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(""
                     : "+" PF_VECTOR_REGISTER(x),
                       "+" PF_VECTOR_REGISTER(y));  // the operands may have changed: nothing can be hoisted
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) sum[j] = step(x, y, sum[j]);
  }
  Vf all = {};
  for (const Vf& s : sum) all += s;
  return Sum(all);
}

}  // namespace

// GFLOP/s of the widest multiply-add this level has for dtype, on all threads, out of registers: what no
// kernel can exceed. bf16 counts the pairwise dot product where there is one; negative when the level has
// none.
PF_EXPORT double pf_bench_multiply_add(int32_t dtype, double seconds) {
#if !defined(__AVX512BF16__)
  if (dtype == PF_BF16) return -1;
#endif
  constexpr int64_t kRounds = 1 << 18;
  volatile float kept = 0;
  const double each = SecondsPerRun(seconds, [&] {
#pragma omp parallel
    {
      float result = 0;
#if defined(__AVX512BF16__)
      if (dtype == PF_BF16)
        result = Spin(kRounds, [](Vf a, Vf b, Vf c) {
          return (Vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
        });
      else
#endif
        result = Spin(kRounds, [](Vf a, Vf b, Vf c) { return Fma(a, b, c); });
      if (omp_get_thread_num() == 0) kept = result;
    }
  });
  const double per_lane = dtype == PF_BF16 ? 4 : 2;
  return 1e-9 * 12.0 * kRounds * kLanes * per_lane * omp_get_max_threads() / each;
}

// Version of the oneDNN that was loaded, as major·10000 + minor·100 + patch.
PF_EXPORT int32_t pf_bench_onednn_version() {
  const dnnl_version_t* v = dnnl_version();
  return v->major * 10000 + v->minor * 100 + v->patch;
}
