// What every kernel file starts from: the CUDA language, or the emulator in its place (emulator.h), one way
// to launch, loads and stores of either dtype, and sums over warps and blocks. Kernels are templates over the
// storage types; arithmetic is f32.
#pragma once
#include "backends/cuda/memory.h"
#include "core/check.h"
#include "core/half.h"
#include "core/op.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define PF_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
typedef cudaStream_t DeviceStream;
#else
#include "backends/cuda/emulator.h"
#define PF_DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(emulator::Dynamic())
typedef void* DeviceStream;
#endif

// The dynamic shared memory that every kernel may have without asking (Launch asks when it is more).
constexpr size_t kPlainShared = 48 << 10;

#if defined(__CUDACC__)
// The runtime remembers an error until somebody asks, and would blame the next launch for it.
static inline int32_t DeviceStatus(const PfArgs* a, cudaError_t status, const char* what) {
  if (status == cudaSuccess) return PF_OK;
  cudaGetLastError();
  return Fail(a, PF_ERR_DEVICE, "%s failed: %s", what, cudaGetErrorString(status));
}
#endif

// Queues kernel<<<grid, block, shared>>>(arguments...) on the call's stream; PF_OK or the launch's error.
// Arguments are passed by value and must have the kernel's parameter types.
template <class... P, class... A>
int32_t Launch(const PfArgs* a, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
#if defined(__CUDACC__)
  cudaError_t status = cudaSuccess;
  if (shared > kPlainShared)
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status == cudaSuccess) {
    kernel<<<grid, block, shared, static_cast<DeviceStream>(a->context->stream)>>>(
        static_cast<P>(arguments)...);
    status = cudaGetLastError();
  }
  return DeviceStatus(a, status, "launch");
#else
  const auto run = [=] {
    return emulator::Run(grid, block, shared, [&] { kernel(static_cast<P>(arguments)...); });
  };
  if (emulator::Queue(run)) return PF_OK;
  return Fail(a, PF_ERR_DEVICE, "%s", emulator::Error());
#endif
}

// The most shared memory that a block of this device may have: 227 KB on Hopper, 163 on A100, 99 on cards of
// 8.6, 8.9 and 12.0.
static inline size_t MostShared() {
#if defined(__CUDACC__)
  static const size_t most = [] {
    int device = 0, bytes = 0;
    const bool known =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
    return known ? static_cast<size_t>(bytes) : kPlainShared;
  }();
  return most;
#else
  return emulator::MostShared();
#endif
}

static inline int32_t DeviceZero(const PfArgs* a, void* at, size_t bytes) {
#if defined(__CUDACC__)
  const cudaError_t status = cudaMemsetAsync(at, 0, bytes, static_cast<DeviceStream>(a->context->stream));
  return DeviceStatus(a, status, "memset");
#else
  (void)a;
  emulator::Queue([=] { return memset(at, 0, bytes) != nullptr; });
  return PF_OK;
#endif
}
static inline int32_t DeviceCopy(const PfArgs* a, void* to, const void* from, size_t bytes) {
#if defined(__CUDACC__)
  const cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                                             static_cast<DeviceStream>(a->context->stream));
  return DeviceStatus(a, status, "copy");
#else
  (void)a;
  emulator::Queue([=] { return memmove(to, from, bytes) != nullptr; });
  return PF_OK;
#endif
}

static inline void* DeviceScratch(const PfArgs* a, size_t bytes) {
  return a->context->scratch(a->context, bytes);
}

// Where a kernel notes a value that it cannot work with (memory.h).
static inline int32_t* Faults(const PfArgs* a) { return static_cast<int32_t*>(a->context->faults); }

// Sizes of the machine that launches are cut to; chosen so that any GPU from sm_80 on is filled.
constexpr int kMostBlocks = 132 * 16;
static inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// N neighbouring elements in one access; the address must be a multiple of N * sizeof(T).
template <class T, int N>
struct __align__(sizeof(T) * N) Pack {
  T of[N];
};

// nvcc parts the copy of a struct into its members and does not always join them again; words stay whole.
template <int kBytes>
struct PackWords;
template <>
struct PackWords<2> {
  typedef uint16_t Type;
};
template <>
struct PackWords<4> {
  typedef uint32_t Type;
};
template <>
struct PackWords<8> {
  typedef uint2 Type;
};
template <>
struct PackWords<16> {
  typedef uint4 Type;
};
template <class P>
__device__ __forceinline__ P FetchPack(const P* at) {
#if defined(__CUDA_ARCH__)
  typedef typename PackWords<sizeof(P)>::Type Words;
  const Words words = *reinterpret_cast<const Words*>(at);
  P pack;
  memcpy(&pack, &words, sizeof(P));
  return pack;
#else
  return *at;
#endif
}
template <class T, int N>
__device__ __forceinline__ void LoadPack(const T* at, float* to) {
  const Pack<T, N> pack = FetchPack(reinterpret_cast<const Pack<T, N>*>(at));
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = ToFloat(pack.of[i]);
}
template <class T, int N>
__device__ __forceinline__ Pack<T, N> RoundPack(const float* from) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.of[i] = FromFloat<T>(from[i]);
  return pack;
}
template <class T, int N>
__device__ __forceinline__ void StorePack(T* at, const float* from) {
  *reinterpret_cast<Pack<T, N>*>(at) = RoundPack<T, N>(from);
}
// To global memory, with the intrinsic, as stores of words are parted, too.
template <class T, int N>
__device__ __forceinline__ void StoreGlobalPack(T* at, const float* from) {
#if defined(__CUDA_ARCH__)
  const Pack<T, N> pack = RoundPack<T, N>(from);
  typename PackWords<sizeof(pack)>::Type words;
  memcpy(&words, &pack, sizeof(pack));
  __stwb(reinterpret_cast<decltype(words)*>(at), words);
#else
  StorePack<T, N>(at, from);
#endif
}
static inline bool Aligned(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// The sum of a warp, in every lane; the order is fixed.
__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits >>= 1) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}
// The sum of a block of whole warps, in every thread. May be called again at once.
template <int kThreads>
__device__ __forceinline__ float BlockSum(float x) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ float of_warp[kThreads / 32];
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) x += of_warp[i];
  __syncthreads();
  return x;
}
