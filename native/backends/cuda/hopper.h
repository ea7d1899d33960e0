// What compute capability 9.0 has and mma.h has not, apart from its products (wgmma.h): barriers in shared
// memory that count arrivals and bytes (mbarrier), boxes of a tensor copied by the TMA unit, named barriers
// and registers passed from warpgroup to warpgroup. Each has a twin for the emulator. Only code for sm_90a
// has the instructions: kernels wrap their bodies in PF_HOPPER and are empty for other architectures.
#pragma once
#include "backends/cuda/mma.h"

#if !defined(__CUDACC__)
#include "backends/cuda/emulator_hopper.h"
#define PF_HOPPER 1
typedef emulator::TensorMap TensorMap;
#else
#include <cuda.h>
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PF_HOPPER 1
#else
#define PF_HOPPER 0
#endif
typedef CUtensorMap TensorMap;
#endif

#if !defined(__CUDACC__)

static inline uint32_t SharedAddress(const void* p) { return emulator::SharedOffset(p); }
static inline void MBarrierInit(uint64_t* barrier, uint32_t arrivals) {
  emulator::MBarrierInit(barrier, arrivals);
}
static inline void MBarrierInitFence() {}
static inline void MBarrierArrive(uint64_t* barrier) { emulator::MBarrierArrive(barrier, 0); }
static inline void MBarrierArriveExpecting(uint64_t* barrier, uint32_t bytes) {
  emulator::MBarrierArrive(barrier, bytes);
}
static inline void MBarrierWait(uint64_t* barrier, uint32_t parity) {
  while (!emulator::MBarrierTest(barrier, parity)) emulator::Wait();
}
static inline void CopyBox(void* to, const TensorMap& map, int column, int head, int row, int batch,
                           uint64_t* barrier) {
  emulator::CopyBoxLater(to, map, {column, head, row, batch}, barrier);
}
static inline void NamedBarrierSync(int id, int threads) { emulator::BlockBarrier(id, threads); }
static inline void NamedBarrierArrive(int id, int threads) { emulator::BlockArrive(id, threads); }
template <int kRegisters>
void GiveRegisters() {}
template <int kRegisters>
void TakeRegisters() {}

#elif PF_HOPPER

// A barrier's phase ends when all its arrivals have come and as many bytes as they announced.
__device__ __forceinline__ void MBarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(arrivals)
               : "memory");
}
// By the thread that made the barriers, and before __syncthreads: the TMA unit sees them, too.
__device__ __forceinline__ void MBarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void MBarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
// Arrives and announces the bytes of copies that this thread starts next.
__device__ __forceinline__ void MBarrierArriveExpecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity is over; the phase before the first counts as one of parity 1.
__device__ __forceinline__ void MBarrierWait(uint64_t* barrier, uint32_t parity) {
  const uint32_t at = SharedAddress(barrier);
  uint32_t over = 0;
  while (!over)  // try_wait itself sleeps for a time that the hardware chooses
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(at), "r"(parity)
        : "memory");
}

// One box of the tensor, written in the swizzle of its map, zeros beyond the tensor's edges; its bytes arrive
// at the barrier. `to` is a multiple of 1024. By one thread.
__device__ __forceinline__ void CopyBox(void* to, const TensorMap& map, int column, int head, int row,
                                        int batch, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(SharedAddress(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(head), "r"(row), "r"(batch),
      "r"(SharedAddress(barrier))
      : "memory");
}

// Barriers 1 to 15 of a block, among `threads` threads of whole warps; who only arrives does not wait.
__device__ __forceinline__ void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void NamedBarrierArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// By all warps of a warpgroup: the most registers that its threads have from here on.
template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif
