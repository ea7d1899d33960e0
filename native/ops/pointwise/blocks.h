// Element-wise work in blocks that stay in the first-level cache. Any mix of f32 and bf16 operands passes
// through small float buffers, so each formula is compiled once and not once per combination of dtypes.
#pragma once
#include "backends/cpu/simd.h"
#include "ops/pointwise/shape_text.h"

static constexpr int64_t kBlock = 2048;
static constexpr int64_t kParallel = 1 << 15;  // for fewer elements, waking threads costs more than it saves

static inline int64_t MinOf(int64_t a, int64_t b) { return a < b ? a : b; }

// Where the floats of v[at, at + n) are: in place for f32, converted into the buffer for bf16.
static inline const float* ReadBlock(const PfView& v, int64_t at, int64_t n, float* buffer) {
  if (v.dtype == PF_F32) return PfData<float>(v) + at;
  const Bf16* p = PfData<Bf16>(v) + at;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreF(buffer + i, LoadF(p + i));
  for (; i < n; ++i) buffer[i] = ToFloat(p[i]);
  return buffer;
}
// A result is computed into BeginWrite(...) and lands in v with EndWrite(...).
static inline float* BeginWrite(const PfView& v, int64_t at, float* buffer) {
  return v.dtype == PF_F32 ? PfData<float>(v) + at : buffer;
}
static inline void EndWrite(const PfView& v, int64_t at, int64_t n, const float* values) {
  if (v.dtype == PF_F32) return;
  Bf16* p = PfData<Bf16>(v) + at;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreF(p + i, LoadF(values + i));
  for (; i < n; ++i) p[i] = ToBf16(values[i]);
}

// body(task) for every task; work is the number of elements in all, which decides whether to fork.
template <class Body>
static inline void ForTasks(int64_t tasks, int64_t work, Body body) {
  if (tasks < 2 || work < kParallel) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < tasks; ++i) body(i);
}
// body(at, n) for consecutive blocks of [0, count).
template <class Body>
static inline void ForBlocks(int64_t count, Body body) {
  ForTasks((count + kBlock - 1) / kBlock, count,
           [&](int64_t i) { body(i * kBlock, MinOf(kBlock, count - i * kBlock)); });
}

template <class F>
static inline void Map(int64_t n, const float* a, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreF(y + i, f(LoadF(a + i)));
  if (i < n) StoreN(y + i, f(LoadN(a + i, n - i)), n - i);
}
template <class F>
static inline void Map(int64_t n, const float* a, const float* b, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreF(y + i, f(LoadF(a + i), LoadF(b + i)));
  if (i < n) StoreN(y + i, f(LoadN(a + i, n - i), LoadN(b + i, n - i)), n - i);
}
template <class F>
static inline void Map(int64_t n, const float* a, const float* b, const float* c, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) StoreF(y + i, f(LoadF(a + i), LoadF(b + i), LoadF(c + i)));
  if (i < n) StoreN(y + i, f(LoadN(a + i, n - i), LoadN(b + i, n - i), LoadN(c + i, n - i)), n - i);
}

// y[i] = f(p[i]...) straight from storage to storage, two vectors at a time; y may be one of the operands.
template <class T, class F, class... P>
static inline void MapStored(int64_t n, T* y, F f, const P*... p) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    StorePair(y + i, f(LoadF(p + i)...), f(LoadF(p + i + kLanes)...));
  for (; i < n; i += kLanes) StoreN(y + i, f(LoadN(p + i, n - i)...), n - i);
}
// Whether a kernel may skip the buffers: what is there has one type.
template <class... V>
static inline bool OneType(const PfView& v, const V&... others) {
  return ((!PfPresent(others) || others.dtype == v.dtype) && ...);
}
