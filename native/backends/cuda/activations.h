// Activations of the epilogues and of the op `unary`, in the accuracy of f32.
#pragma once
#include "backends/cuda/device.h"

constexpr float kGeluScale = 1.5957691216057308f;  // 2 sqrt(2 / pi)

__device__ __forceinline__ float Sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float GeluSigmoid(float x) {
  return Sigmoid(kGeluScale * (x + 0.044715f * x * x * x));
}
__device__ __forceinline__ float Silu(float x) { return x * Sigmoid(x); }
// x (1 + tanh(z)) / 2 = x sigmoid(2 z)
__device__ __forceinline__ float GeluTanh(float x) { return x * GeluSigmoid(x); }
