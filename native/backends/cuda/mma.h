// Tensor-core products, the loads that feed them and asynchronous copies to shared memory (sm_80 and newer),
// each with a twin that does the same on the emulator's lanes. Fragments are as in the PTX manual's
// mma.m16n8k16; with g = lane / 4 and t = lane % 4, a register holding two neighbours (low half first):
//   A [16, 16]  a0: row g, k 2t    a1: row g + 8, k 2t    a2: row g, k 2t + 8    a3: row g + 8, k 2t + 8
//   B [16, 8]   b0: k 2t, column g             b1: k 2t + 8, column g
//   C [16, 8]   c0, c1: row g, columns 2t, 2t + 1          c2, c3: row g + 8
#pragma once
#include "backends/cuda/device.h"

#if defined(__CUDACC__)

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a b in f32.
__device__ __forceinline__ void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of bf16: lane i gives the address of row i % 8 of matrix i / 8 (16 bytes, aligned);
// register m receives from matrix m row lane / 4, columns 2 (lane % 4) and the next; transposed: column lane
// / 4 instead.
__device__ __forceinline__ void LdMatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ __forceinline__ void LdMatrixTransposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// 16 bytes from global to shared memory, past the registers; bytes 0: zeros are written and nothing is read.
__device__ __forceinline__ void CopyAsync16(void* to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
// 4 bytes, for what no alignment is known of.
__device__ __forceinline__ void CopyAsync4(void* to, const void* from, bool present) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(present ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kLeft` of this thread's groups are under way; other threads' copies need __syncthreads as
// well.
template <int kLeft>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// 2^x, relative error below 2^-22; 0 for -inf.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to bf16, the first in the low half.
__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#else

static inline float HalfOf(uint32_t pair, int which) {
  return ToFloat(Bf16{static_cast<uint16_t>(pair >> (16 * which))});
}

static inline void MmaBf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct {
    uint32_t a[4], b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emulator::WarpValues& all = emulator::WarpExchange(0xffffffffu, &mine, sizeof(mine));
  const auto of = [&](int lane, int reg) {
    uint32_t value;
    memcpy(&value, all.of[lane] + 4 * reg, 4);
    return value;
  };
  const int g = emulator::Lane() / 4, t = emulator::Lane() % 4;
  for (int c = 0; c < 4; ++c) {
    const int row = c / 2, column = 2 * t + c % 2;  // row 0: g, 1: g + 8
    float sum = d[c];
    for (int k = 0; k < 16; ++k) {
      const int high = k / 8, pair = k % 8 / 2;
      sum += HalfOf(of(4 * g + pair, row + 2 * high), k % 2) * HalfOf(of(4 * column + pair, 4 + high), k % 2);
    }
    d[c] = sum;
  }
}

template <bool kTransposed>
static inline void EmulatedLdMatrix(uint32_t (&r)[4], const void* row) {
  unsigned char mine[16];
  memcpy(mine, row, 16);
  const emulator::WarpValues& all = emulator::WarpExchange(0xffffffffu, mine, 16);
  const int g = emulator::Lane() / 4, t = emulator::Lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int from = kTransposed ? 2 * t + k : g, column = kTransposed ? g : 2 * t + k;
      memcpy(&pair[k], all.of[8 * m + from] + 2 * column, 2);
    }
    r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}
static inline void LdMatrix(uint32_t (&r)[4], const void* row) { EmulatedLdMatrix<false>(r, row); }
static inline void LdMatrixTransposed(uint32_t (&r)[4], const void* row) { EmulatedLdMatrix<true>(r, row); }

static inline void CopyAsync16(void* to, const void* from, bool present) {
  emulator::CopyLater(to, from, present ? 16 : 0, present ? 0 : 16);
}
static inline void CopyAsync4(void* to, const void* from, bool present) {
  emulator::CopyLater(to, from, present ? 4 : 0, present ? 0 : 4);
}
static inline void CopyAsyncCommit() { emulator::CopyCommit(); }
template <int kLeft>
void CopyAsyncWait() {
  emulator::CopyWait(kLeft);
}

static inline float Exp2(float x) { return exp2f(x); }
static inline uint32_t PackBf16(float low, float high) {
  return ToBf16(low).bits | static_cast<uint32_t>(ToBf16(high).bits) << 16;
}

#endif
