// The emulator's share of hopper.h and wgmma.h. What the hardware does in its own time is done as late as the
// rules allow, when somebody waits for it; until then its target holds NaN, and an operand that changes while
// a product is under way is an error. So missing waits, too early releases of a buffer, and descriptors or
// swizzles that do not fit each other are found.
#pragma once
#include "backends/cuda/emulator.h"

namespace emulator {

// A tensor of bf16 [.., D]: four dimensions from the innermost on, bytes from one entry to the next of the
// outer three, and the box that one copy brings.
struct TensorMap {
  const unsigned char* data;
  uint64_t dims[4], strides[3];
  uint32_t box[4];
};
struct BoxAt {
  int32_t of[4];
};

uint32_t SharedOffset(const void* p);  // of dynamic shared memory; the address that descriptors hold

void MBarrierInit(void* barrier, uint32_t arrivals);
void MBarrierArrive(void* barrier, uint32_t expected_bytes);
bool MBarrierTest(void* barrier, uint32_t parity);  // whether the phase of this parity is over
void CopyBoxLater(void* to, const TensorMap& map, const BoxAt& at, void* barrier);

// One wgmma.mma_async; descriptors as the instruction has them.
struct Product {
  int n;
  uint64_t a, b;
  bool a_shared, b_across, accumulate;
};
// `d` are the thread's n / 2 accumulators, `a` its four registers of the left operand where those hold it.
// Both are read and written at the wait, as the hardware may.
void ProductIssue(const Product& product, float* d, const uint32_t* a);
void ProductFence();
void ProductCommit();
void ProductWait(int groups_left);

// For the emulator itself: at the beginning and the end of a block.
void AsyncReset(int threads);
const char* AsyncLeft();  // what nobody waited for; nullptr: nothing

}  // namespace emulator
