// For cases that the sweep of op_test.h cannot state: calling a backend's kernels directly and comparing two
// of its own results. A failure ends the run.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/backend.h"
#include "core/half.h"
#include "core/op_test.h"

inline PfView View(void* data, int32_t dtype, const op_test::Dims& dims) {
  PfView v{data, dtype, static_cast<int32_t>(dims.size()), {}};
  for (size_t i = 0; i < dims.size(); ++i) v.dims[i] = dims[i];
  return v;
}

struct DirectContext : PfContext {
  std::vector<std::unique_ptr<char[]>> blocks;
};
inline void* DirectScratch(PfContext* self, size_t bytes) {
  auto& blocks = static_cast<DirectContext*>(self)->blocks;
  blocks.emplace_back(new char[bytes + 64]);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(blocks.back().get()) + 63) & ~uintptr_t{63});
}

inline void Call(const PfBackendTable* table, int op, std::vector<PfView> in, std::vector<PfView> out,
                 std::vector<double> scalars) {
  DirectContext context;
  context.scratch = DirectScratch;
  const PfArgs args{in.data(),
                    out.data(),
                    scalars.data(),
                    static_cast<int32_t>(in.size()),
                    static_cast<int32_t>(out.size()),
                    static_cast<int32_t>(scalars.size()),
                    &context};
  if (table->kernels[op](&args) == PF_OK) return;
  std::printf("FAIL %s op %d: %s\n", table->name, op, context.error);
  std::exit(1);
}

// count values in (-1, 1), as bytes of a float dtype.
inline std::vector<char> Values(int32_t dtype, int64_t count, uint32_t seed) {
  const size_t size = PfSize(dtype);
  std::vector<char> bytes(count * size);
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    const float x = (seed >> 8) / 8388608.0f - 1;
    const Bf16 h = ToBf16(x);
    std::memcpy(&bytes[i * size], dtype == PF_BF16 ? static_cast<const void*>(&h) : &x, size);
  }
  return bytes;
}

template <class Body>
void EveryBackend(const Body& body) {
  for (const CpuLevel& level : CpuLevels()) {
    if (!level.unusable.empty()) continue;
    const Backend backend = OpenBackend(PF_OUT_DIR, level.name);
    if (backend.table) body(backend.table);
  }
}

// run(outputs) with 1, 2 and 3 threads: every bit of every output (of the given lengths) must agree.
template <class Run>
void SameBitsOnAnyThreads(const PfBackendTable* table, const char* op, const std::vector<int64_t>& lengths,
                          const Run& run) {
  std::vector<std::vector<float>> first;
  for (int threads = 1; threads <= 3; ++threads) {
    char error[256] = "";
    table->init(threads, error);
    std::vector<std::vector<float>> outputs;
    std::vector<float*> pointers;
    for (int64_t n : lengths) outputs.emplace_back(n, 0.0f);
    for (auto& o : outputs) pointers.push_back(o.data());
    run(pointers);
    if (threads == 1) first = outputs;
    for (size_t i = 0; i < outputs.size(); ++i)
      if (std::memcmp(outputs[i].data(), first[i].data(), outputs[i].size() * 4)) {
        std::printf("FAIL %s %s: output %zu differs between 1 and %d threads\n", table->name, op, i, threads);
        std::exit(1);
      }
  }
  char error[256] = "";
  table->init(2, error);
}
