// Products of a warpgroup, four neighbouring warps (wgmma.mma_async): 64 rows by N columns by 16, bf16 in and
// f32 out, asynchronous. The right operand lies in shared memory, the left one there or in registers. Of the
// accumulator and of a left operand in registers, warp w of the group has rows 16 w to 16 w + 15, laid out
// within the warp as mma.h says of C and A, so that a result becomes a left operand in place; d[n] holds
// columns 8 n to 8 n + 7.
#pragma once
#include "backends/cuda/hopper.h"

// Where an operand lies (PTX ISA, "Matrix Descriptor Format"): panels of 128 bytes in the 128-byte swizzle,
// which is by address, so that a descriptor moves along a panel by plain addition; a panel begins at a
// multiple of 1024. `stride`: bytes from one group of eight rows to the next. `leading`: bytes from panel to
// panel; only read where the rows are those of the sum, not of the result (kAcross).
static inline PF_HD uint64_t MatrixDescriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  const auto encode = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return encode(address) | encode(leading) << 16 | encode(stride) << 32 | uint64_t{1} << 62;
}
// What is added to a descriptor to move it.
static inline PF_HD constexpr uint64_t DescriptorStep(int bytes) { return static_cast<uint64_t>(bytes) >> 4; }

#if !defined(__CUDACC__)

static inline void WgmmaFence() { emulator::ProductFence(); }
static inline void WgmmaCommit() { emulator::ProductCommit(); }
template <int kLeft>
void WgmmaWait() {
  emulator::ProductWait(kLeft);
}
template <int kN, class T>
void HoldRegisters(T (&)[kN][4]) {}
template <int kN>
void WgmmaShared(float (&d)[kN][4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::ProductIssue({8 * kN, a, b, true, false, accumulate}, d[0], nullptr);
}
template <int kN>
void WgmmaAcross(float (&d)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  emulator::ProductIssue({8 * kN, 0, b, false, true, true}, d[0], a);
}

#elif PF_HOPPER

// Orders what was done to registers before the products that read or write them.
__device__ __forceinline__ void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kLeft of the groups are under way.
template <int kLeft>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from moving arithmetic with these registers across: it does not know that they change
// between a product and the wait for it.
template <int kN>
__device__ __forceinline__ void HoldRegisters(float (&x)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
    asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
}
template <int kN>
__device__ __forceinline__ void HoldRegisters(uint32_t (&x)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
    asm volatile("" : "+r"(x[n][0]), "+r"(x[n][1]), "+r"(x[n][2]), "+r"(x[n][3])::"memory");
}

// An instruction's accumulator, as operands and in its text.
#define PF_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define PF_D4(n) PF_D1(n), PF_D1(n + 1), PF_D1(n + 2), PF_D1(n + 3)
#define PF_D8 PF_D4(0), PF_D4(4)
#define PF_D16 PF_D8, PF_D4(8), PF_D4(12)
#define PF_TEXT_D8                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PF_TEXT_D16                                                               \
  PF_TEXT_D8                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = A B^T, or d += A B^T: both in shared memory, with rows along the sum.
__device__ __forceinline__ void WgmmaShared(float (&d)[8][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PF_TEXT_D8
      "}, %32, %33, accumulate, 1, 1, 0, 0;\n}"
      : PF_D8
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}
__device__ __forceinline__ void WgmmaShared(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PF_TEXT_D16
      "}, %64, %65, accumulate, 1, 1, 0, 0;\n}"
      : PF_D16
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
}

// d += A B: A in registers, B in shared memory with rows along the result.
__device__ __forceinline__ void WgmmaAcross(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" PF_TEXT_D8
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : PF_D8
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void WgmmaAcross(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" PF_TEXT_D16
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : PF_D16
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef PF_D1
#undef PF_D4
#undef PF_D8
#undef PF_D16
#undef PF_TEXT_D8
#undef PF_TEXT_D16

#endif
