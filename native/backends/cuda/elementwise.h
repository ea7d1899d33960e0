// Element-wise kernels over operands of either dtype. The dtype is looked at once a pack and is the same for
// all threads, so each formula is compiled once and not once per combination of dtypes; memory, not this
// test, is the limit.
#pragma once
#include "backends/cuda/device.h"
#include "ops/pointwise/shape_text.h"

struct FloatArray {
  void* data;  // nullptr: absent, reads as 0
  int32_t dtype;
};
static inline FloatArray ArrayOf(const PfView& v) { return {v.data, v.dtype}; }

template <int N>
__device__ __forceinline__ void ReadPack(const FloatArray& v, int64_t at, float* to) {
  if (v.data == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = 0;
  } else if (v.dtype == PF_F32) {
    constexpr int kPart = N < 4 ? N : 4;  // 16 bytes are the most that one load takes
#pragma unroll
    for (int i = 0; i < N; i += kPart)
      LoadPack<float, kPart>(static_cast<const float*>(v.data) + at + i, to + i);
  } else {
    LoadPack<Bf16, N>(static_cast<const Bf16*>(v.data) + at, to);
  }
}
template <int N>
__device__ __forceinline__ void WritePack(const FloatArray& v, int64_t at, const float* from) {
  if (v.data == nullptr) return;
  if (v.dtype == PF_F32) {
    constexpr int kPart = N < 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += kPart)
      StoreGlobalPack<float, kPart>(static_cast<float*>(v.data) + at + i, from + i);
  } else {
    StoreGlobalPack<Bf16, N>(static_cast<Bf16*>(v.data) + at, from);
  }
}
__device__ __forceinline__ float ReadOne(const FloatArray& v, int64_t at) {
  float x;
  ReadPack<1>(v, at, &x);
  return x;
}
__device__ __forceinline__ void WriteOne(const FloatArray& v, int64_t at, float x) {
  WritePack<1>(v, at, &x);
}

// Whether packs of 8 may be read at multiples of 8 elements.
static inline bool Packs(const FloatArray& v) { return Aligned(v.data, 16); }

template <int kIn, int kOut>
struct FloatArrays {
  FloatArray in[kIn > 0 ? kIn : 1], out[kOut];
};

constexpr int kElementThreads = 256;

// y[k][i] = fn(i, x[0][i], x[1][i], ...): fn(int64_t i, const float* x, float* y) on one element.
template <int N, int kIn, int kOut, class Fn>
__global__ void __launch_bounds__(kElementThreads)
    ElementKernel(const __grid_constant__ FloatArrays<kIn, kOut> arrays, int64_t n,
                  const __grid_constant__ Fn fn) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x) * N;
  if (at >= n) return;
  float x[kIn > 0 ? kIn : 1][N], y[kOut][N];
  if (at + N <= n) {
#pragma unroll
    for (int k = 0; k < kIn; ++k) ReadPack<N>(arrays.in[k], at, x[k]);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float one[kIn > 0 ? kIn : 1], result[kOut];
#pragma unroll
      for (int k = 0; k < kIn; ++k) one[k] = x[k][i];
      fn(at + i, one, result);
#pragma unroll
      for (int k = 0; k < kOut; ++k) y[k][i] = result[k];
    }
#pragma unroll
    for (int k = 0; k < kOut; ++k) WritePack<N>(arrays.out[k], at, y[k]);
    return;
  }
  for (int64_t i = at; i < n; ++i) {
    float one[kIn > 0 ? kIn : 1], result[kOut];
    for (int k = 0; k < kIn; ++k) one[k] = ReadOne(arrays.in[k], i);
    fn(i, one, result);
    for (int k = 0; k < kOut; ++k) WriteOne(arrays.out[k], i, result[k]);
  }
}

template <int kIn, int kOut, class Fn>
int32_t Elements(const PfArgs* a, const FloatArrays<kIn, kOut>& arrays, int64_t n, Fn fn) {
  if (n == 0) return PF_OK;
  bool packs = true, floats = true;
  const auto look = [&](const FloatArray& v) {
    packs &= Packs(v);
    floats &= v.data == nullptr || v.dtype == PF_F32;
  };
  for (int k = 0; k < kIn; ++k) look(arrays.in[k]);
  for (int k = 0; k < kOut; ++k) look(arrays.out[k]);
  // 16 bytes a thread: two stores of 16 would each write halves of all sectors of memory.
  const int per_thread = !packs ? 1 : floats ? 4 : 8;
  const auto kernel = !packs   ? &ElementKernel<1, kIn, kOut, Fn>
                      : floats ? &ElementKernel<4, kIn, kOut, Fn>
                               : &ElementKernel<8, kIn, kOut, Fn>;
  const dim3 grid(static_cast<unsigned>(CeilDiv(n, static_cast<int64_t>(kElementThreads) * per_thread)));
  return Launch(a, kernel, grid, kElementThreads, 0, arrays, n, fn);
}
