// What a .cu file needs to be compiled by a C++ compiler and run on the host, thread by thread: so that
// kernels can be judged by the op cases, under sanitizers and in a debugger, on machines without a GPU. Every
// CUDA thread of a block is a fiber; blocks run one after the other. It finds wrong arithmetic, wrong
// indices, barriers that not all threads reach (reported as a stuck kernel), copies that nobody waited for,
// and, as the order of the threads can be turned round (PYRAFLOW_EMULATOR_ORDER=reverse), most missing
// barriers. It says nothing about speed.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  uint32_t x, y;
};
struct __align__(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct Place {
  dim3 thread, block, block_dim, grid_dim;
};
extern Place place;  // of the fiber that runs

int Linear();                          // index of the thread in its block
void Wait();                           // lets the other threads run; the caller looks again
void BlockBarrier(int id, int count);  // count 0: all threads of the block
void BlockArrive(int id, int count);   // counts, and does not wait
int BlockOr(int value);                // __syncthreads_or
void* Dynamic();                       // dynamic shared memory of this block
size_t SharedBytes();                  // of it
size_t MostShared();                   // that a block may have; PYRAFLOW_EMULATOR_SHARED makes it less
void Progress();                       // something happened that a waiting thread may wait for
// Gives up: the launch fails with this reason.
[[noreturn]] void Stop(const char* reason);

// All threads of a warp that are in the mask give `bytes` (at most 64) and receive those of every lane.
struct WarpValues {
  alignas(16) unsigned char of[32][64];
};
const WarpValues& WarpExchange(uint32_t mask, const void* value, size_t bytes);

// Asynchronous copies are done when they are waited for, not before: a missing wait reads old bytes.
void CopyLater(void* to, const void* from, size_t bytes, size_t zeros);
void CopyCommit();
void CopyWait(int groups_left);

// What is launched while `noted` is set is noted there instead of being run.
typedef std::vector<std::function<bool()>> Launches;
extern Launches* noted;

// Runs every block; false when a kernel got stuck, with the reason in Error().
bool Run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
const char* Error();

template <class T>
T Shuffle(uint32_t mask, T value, int from) {
  static_assert(sizeof(T) <= 8);
  const WarpValues& values = WarpExchange(mask, &value, sizeof(T));
  T result;
  memcpy(&result, values.of[from & 31], sizeof(T));
  return result;
}
// Runs `launch`, a copy of which must be enough to run it later, or notes it.
template <class F>
bool Queue(F launch) {
  if (!noted) return launch();
  noted->push_back(std::move(launch));
  return true;
}
inline int Lane() { return Linear() & 31; }

}  // namespace emulator

#define threadIdx (emulator::place.thread)
#define blockIdx (emulator::place.block)
#define blockDim (emulator::place.block_dim)
#define gridDim (emulator::place.grid_dim)

static inline void __syncthreads() { emulator::BlockBarrier(0, 0); }
static inline int __syncthreads_or(int value) { return emulator::BlockOr(value); }
static inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  const char nothing = 0;
  emulator::WarpExchange(mask, &nothing, 1);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int = 32) {
  return emulator::Shuffle(mask, value, from);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int = 32) {
  return emulator::Shuffle(mask, value, emulator::Lane() ^ bits);
}
static inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  const int32_t mine = predicate != 0;
  const auto& all = emulator::WarpExchange(mask, &mine, 4);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) {
    int32_t theirs;
    memcpy(&theirs, all.of[i], 4);
    if ((mask >> i & 1) && theirs) bits |= 1u << i;
  }
  return bits;
}
static inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
static inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

#define __expf(x) expf(x)  // glibc declares a function of this name and does not define it
static inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __int2float_rn(int a) { return static_cast<float>(a); }
