// Rows in f32: kernels that are bound by memory read any float storage through here and are written once.
#pragma once
#include <omp.h>

#include "backends/cpu/simd.h"

// Below this many elements a parallel region costs more than it saves.
static constexpr int64_t kParallelWork = 1 << 14;

static inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
static inline T* Scratch(const PfArgs* a, int64_t count) {
  return static_cast<T*>(a->context->scratch(a->context, (count > 0 ? count : 1) * sizeof(T)));
}
static inline int32_t NoMemory(const PfArgs* a, const char* op) {
  return Fail(a, PF_ERR_MEMORY, "%s: no scratch memory left", op);
}

// Calls f(i, lanes) for whole vectors, then once for what remains.
template <class F>
static inline void ForLanes(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, int64_t{kLanes});
  if (i < n) f(i, n - i);
}

// Sum of term(i, lanes) over a row; four partial sums hide the latency of the additions.
template <class F>
static inline float RowSum(int64_t n, F term) {
  Vf s[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int u = 0; u < 4; ++u) s[u] += term(i + u * kLanes, int64_t{kLanes});
  for (; i + kLanes <= n; i += kLanes) s[0] += term(i, int64_t{kLanes});
  if (i < n) s[1] += term(i, n - i);
  return Sum((s[0] + s[1]) + (s[2] + s[3]));
}

// n values from element offset on: the memory itself when it is f32, otherwise converted into buffer.
static inline const float* ReadRow(const PfView& v, int64_t offset, int64_t n, float* buffer) {
  if (v.dtype == PF_F32) return PfData<float>(v) + offset;
  const Bf16* p = PfData<Bf16>(v) + offset;
  ForLanes(n, [&](int64_t i, int64_t m) { StoreN(buffer + i, LoadN(p + i, m), m); });
  return buffer;
}
// Where to write a row; CommitRow afterwards converts it when it was written into buffer.
static inline float* OpenRow(const PfView& v, int64_t offset, float* buffer) {
  return v.dtype == PF_F32 ? PfData<float>(v) + offset : buffer;
}
static inline void CommitRow(const PfView& v, int64_t offset, int64_t n, const float* row) {
  if (v.dtype == PF_F32) return;
  Bf16* p = PfData<Bf16>(v) + offset;
  ForLanes(n, [&](int64_t i, int64_t m) { StoreN(p + i, LoadN(row + i, m), m); });
}

// A small operand in f32 as a whole; *out is nullptr when it is absent. False when scratch runs out.
static inline bool AsFloats(const PfArgs* a, const PfView& v, const float** out) {
  *out = nullptr;
  if (!PfPresent(v)) return true;
  float* buffer = v.dtype == PF_F32 ? nullptr : Scratch<float>(a, PfCount(v));
  if (v.dtype != PF_F32 && !buffer) return false;
  *out = ReadRow(v, 0, PfCount(v), buffer);
  return true;
}

// The first present operand that is not f32 or bf16, as an index; -1 when all are.
static inline int FirstNotFloat(const PfView* views, int n, unsigned skip = 0) {
  for (int i = 0; i < n; ++i)
    if (PfPresent(views[i]) && !PfIsFloat(views[i]) && !(skip >> i & 1)) return i;
  return -1;
}
