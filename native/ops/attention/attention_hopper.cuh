// What the kernels for compute capability 9.0 share (attention_hopper_forward.cuh,
// attention_hopper_backward.cuh): one warp brings tiles through the TMA unit into a ring of stages, two
// warpgroups of 64 rows each work on them. Heads have 64 or 128 elements in bf16.
#pragma once
#include <stdlib.h>

#include "backends/cuda/tensor_map.h"
#include "backends/cuda/wgmma.h"
#include "ops/attention/attention_mma.cuh"

namespace {

// Registers of the 65536 that 384 threads begin with 168 each of: the copying group keeps 24.
constexpr int kCopyRegisters = 24, kGroupRegisters = 240;
constexpr int kHopperGroups = 2, kGroupRows = 64, kHopperRows = kHopperGroups * kGroupRows;
constexpr int kHopperThreads = 128 * (kHopperGroups + 1);

#if PF_HOPPER

// Where a walk through the ring is: a stage, and the parity of its barriers' phase.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void Advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// Starts the copy of kRows rows, panel by panel; its bytes arrive at the barrier. By one thread.
template <int kPanels, int kRows>
__device__ __forceinline__ void CopyPanels(unsigned char* to, const TensorMap& map, int head, int row,
                                           int batch, uint64_t* barrier) {
  for (int panel = 0; panel < kPanels; ++panel)
    CopyBox(to + panel * kRows * 128, map, panel * 64, head, row, batch, barrier);
}

// Lets a stage's next copy begin. By every warp, after its last look at what lies there.
__device__ __forceinline__ void Release(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) MBarrierArrive(barrier);
}

// The descriptor of rows of 64 or 128 elements in panels of kRows; `across` when the rows are those of the
// sum, which then reads 16 of them at a time.
template <int kRows>
__device__ __forceinline__ uint64_t PanelDescriptor(const unsigned char* tile, bool across) {
  return MatrixDescriptor(SharedAddress(tile), across ? kRows * 128 : 16, 1024);
}
// Starts d = a b^T over kD elements, of kGroupRows rows and kRows: 16 elements of a row are 32 bytes of a
// panel, 64 a whole one.
template <int kD, int kRows, int kN>
__device__ __forceinline__ void StartRows(float (&d)[kN][4], uint64_t a, uint64_t b) {
  static_assert(kRows == 8 * kN);
#pragma unroll
  for (int k = 0; k < kD / 16; ++k)
    WgmmaShared(d, a + DescriptorStep(k / 4 * kGroupRows * 128 + k % 4 * 32),
                b + DescriptorStep(k / 4 * kRows * 128 + k % 4 * 32), k > 0);
}
// Starts d += p b: p in registers, the rows of b are those of the sum.
template <int kN, int kK16>
__device__ __forceinline__ void StartColumns(float (&d)[kN][4], const uint32_t (&p)[kK16][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < kK16; ++k) WgmmaAcross(d, p[k], b + DescriptorStep(k * 16 * 128));
}

// A result, rounded to bf16, as a left operand.
template <int kK16>
__device__ __forceinline__ void PackLeft(uint32_t (&to)[kK16][4], const float (&from)[2 * kK16][4]) {
#pragma unroll
  for (int k = 0; k < kK16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to[k][i] = PackBf16(from[2 * k + i / 2][i % 2 * 2], from[2 * k + i / 2][i % 2 * 2 + 1]);
}

// The warpgroup of a thread: the same in all lanes, and known to be.
__device__ __forceinline__ int GroupOfThread() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
}
// The first of a warp's 16 rows among those of its group.
__device__ __forceinline__ int WarpRow() { return threadIdx.x % 128 / 32 * 16; }

// How the rows of a group from `row` on meet a tile of kTile columns.
template <bool kRowsAreQueries, int kTile>
__device__ __forceinline__ Visibility LookAt(const Mask& mask, int row, int rows, int tile, int columns) {
  if (row >= rows) return kNothing;
  const Visibility see = mask.bounds ? SeeColumns<kRowsAreQueries, kTile>(mask.bounds[row / kBoundsTile],
                                                                          mask.bounds, mask.tiles, tile)
                                     : kAll;
  return see == kAll && (tile + 1) * kTile > columns ? kSome : see;
}

#endif

// PYRAFLOW_HOPPER=off leaves everything to mma.sync; the emulator does unless it is on. With `require`
// nothing that is for these kernels is left to others.
inline const char* HopperWish() {
  static const char* const wish = getenv("PYRAFLOW_HOPPER");
  return wish ? wish : "";
}
inline bool HopperWanted() {
#if defined(__CUDACC__)
  if (!strcmp(HopperWish(), "off")) return false;
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
#else
  return !strcmp(HopperWish(), "on") || !strcmp(HopperWish(), "require");
#endif
}
// Whether this device and shape are for the kernels. A tensor map has no empty dimension.
inline bool HopperShape(const AttentionShape& s) {
  return (s.d == 64 || s.d == 128) && s.batch * s.heads * s.lq * s.lk != 0;
}
inline bool HopperTakes(const AttentionShape& s) { return HopperShape(s) && HopperWanted(); }
// Whether what these kernels would take, and did not, is an error.
inline bool HopperRequired(const AttentionShape& s) {
  return HopperShape(s) && !strcmp(HopperWish(), "require");
}
inline int32_t HopperMissing(const PfArgs* a, const char* op) {
  return Fail(
      a, PF_ERR_DEVICE,
      "%s: PYRAFLOW_HOPPER=require, but the kernels for compute capability 9.0 cannot run: the device is "
      "another, the build lacks sm_90a, or the driver makes no tensor map",
      op);
}
// Whether this build has a kernel's code: one for other devices may run on such a one, too, from virtual
// code, but there the kernel is empty and takes next to no registers.
template <class Call>
bool HopperBuilt(void (*kernel)(Call)) {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess)
    return attributes.numRegs > 64;
  cudaGetLastError();
  return false;
#else
  return kernel != nullptr;
#endif
}

// A map of x [B, length, H, D] whose boxes have `rows` tokens.
inline bool MapRows(const AttentionShape& s, const Rows<Bf16>& x, int64_t length, int rows, TensorMap* map) {
  return MakeTensorMap({x.data, s.batch, length, s.heads, s.d / 64, x.token * 2, int64_t{x.head} * 2}, rows,
                       map);
}

}  // namespace
