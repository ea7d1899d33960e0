// Several packs in one go: the dtype is looked at once and not between the loads, so that all of them are
// under way together. For kernels that keep a good part of a row in registers.
#pragma once
#include "backends/cuda/elementwise.h"

template <class T, int N>
struct PackParts {  // 16 bytes are the most that one load takes
  static constexpr int kSize = N * sizeof(T) < 16 ? N : 16 / static_cast<int>(sizeof(T));
  static constexpr int kCount = N / kSize;
  Pack<T, kSize> of[kCount];
};

template <class T, int K, int N, class At>
__device__ __forceinline__ void LoadPacks(const T* from, At at, float (&to)[K][N]) {
  typedef PackParts<T, N> Parts;
  Parts raw[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t i = at(k);
#pragma unroll
    for (int part = 0; part < Parts::kCount; ++part) {
      raw[k].of[part] = {};
      if (i >= 0) raw[k].of[part] = FetchPack(&reinterpret_cast<const Parts*>(from + i)->of[part]);
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) to[k][j] = ToFloat(raw[k].of[j / Parts::kSize].of[j % Parts::kSize]);
}

// Pack k starts at element at(k), a multiple of N; below zero, or without the operand: zeros.
template <int K, int N, class At>
__device__ __forceinline__ void ReadPacks(const FloatArray& v, At at, float (&to)[K][N]) {
  if (v.data == nullptr) {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int j = 0; j < N; ++j) to[k][j] = 0;
  } else if (v.dtype == PF_F32) {
    LoadPacks(static_cast<const float*>(v.data), at, to);
  } else {
    LoadPacks(static_cast<const Bf16*>(v.data), at, to);
  }
}
