// The contract between the engine and a backend: plain C data, so that a backend is a shared library of its
// own, built with its own instruction set and opened at run time.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "core/half.h"  // PF_HD

#define PF_ABI_VERSION 4
#define PF_MAX_RANK 6
#define PF_EXPORT extern "C" __attribute__((visibility("default")))

enum PfDType : int32_t {
  PF_F32 = 0,
  PF_BF16 = 1,
  PF_I32 = 2,
  PF_U8 = 3,
  PF_F16 = 4,
  PF_F64 = 5,
  PF_I64 = 6,
  PF_I8 = 7,  // only inside packed weights
};

// How a packed weight is kept: in its own type (or the one that is fast), or rounded to eight bits.
enum PfPackForm : int32_t { PF_PACK_PLAIN = 0, PF_PACK_INT8 = 1 };

enum PfStatus : int32_t {
  PF_OK = 0,
  PF_ERR_SHAPE = 1,
  PF_ERR_DTYPE = 2,
  PF_ERR_OPTION = 3,
  PF_ERR_MEMORY = 4,
  PF_ERR_DEVICE = 5,
  PF_ERR_IO = 6,
};

// A contiguous row-major array. An operand that the caller left out has data == nullptr and rank == -1.
struct PfView {
  void* data;
  int32_t dtype;
  int32_t rank;
  int64_t dims[PF_MAX_RANK];
};

// What the engine lends a kernel for the time of one call.
struct PfContext {
  // 64-byte aligned memory, returned to the engine after the call; nullptr when there is none (return
  // PF_ERR_MEMORY).
  void* (*scratch)(PfContext* self, size_t bytes);
  char error[256];  // filled by a kernel that returns something else than PF_OK
  void* stream;     // where a device backend queues its kernels; as given by PfMemory::begin
  void* faults;
};

struct PfArgs {
  const PfView* in;
  const PfView* out;
  const double* scalars;
  int32_t n_in, n_out, n_scalars;
  PfContext* context;
};

typedef int32_t (*PfKernel)(const PfArgs* args);

enum PfOp : int32_t {
#define PF_OP(folder, name, inputs, outputs, scalars) PF_OP_##name,
#include "ops.def"
#undef PF_OP
  PF_OP_COUNT
};

// Memory of a device, for the engine thread that calls begin first: every other function belongs to that
// thread's stream and keeps its order. Functions with an error return PF_OK or fill it (256 bytes).
struct PfMemory {
  int32_t (*begin)(int32_t device, PfContext* context, char* error);  // fills stream and faults
  void (*end)();
  void* (*allocate)(size_t bytes);  // 256-byte aligned; nullptr when there is no room
  void (*release)(void* pointer);
  // Returns when `from` may be changed again.
  int32_t (*upload)(void* to, const void* from, size_t bytes, char* error);
  int32_t (*download)(void* to, const void* from, size_t bytes, char* error);
  // Waits for all that is queued; tells of faults that kernels met since the last time.
  int32_t (*synchronize)(char* error);
  // Called after every op: waits while too much is in flight, so that cancelling stays quick.
  int32_t (*pace)(char* error);
  // From capture on, what kernels launch is noted and not run; captured ends that and makes a graph of it,
  // which launch queues as a whole. capture is nullptr where a device cannot do that.
  int32_t (*capture)(char* error);
  int32_t (*captured)(void** graph, char* error);
  int32_t (*launch)(void* graph, char* error);
  void (*drop)(void* graph);
};

struct PfBackendTable {
  uint32_t abi;
  int32_t op_count;
  const char* name;  // "ref", "cpu_avx512", ...
  const PfKernel* kernels;
  // Called once on the engine thread before the first kernel. Returns PF_OK or fills error (256 bytes).
  int32_t (*init)(int32_t threads, char* error);
  // Bytes of a packed form of a matmul weight [n, k]; 0 when the backend does not have it.
  size_t (*pack_bytes)(int64_t n, int64_t k, int32_t dtype, int32_t form);
  // nullptr: operands lie in the process's own memory.
  const PfMemory* memory;
  // PF_OK and what the device is, or why this backend cannot work here (256 bytes); nullptr: it always can.
  int32_t (*probe)(int32_t device, char* text);
};

// The one symbol a backend exports.
typedef const PfBackendTable* (*PfBackendEntry)();
#define PF_BACKEND_ENTRY "pf_backend"

static inline bool PfPresent(const PfView& v) { return v.data != nullptr; }
static inline int64_t PfCount(const PfView& v) {
  int64_t n = 1;
  for (int i = 0; i < v.rank; ++i) n *= v.dims[i];
  return n;
}
PF_HD static inline size_t PfSize(int32_t dtype) {
  switch (dtype) {
    case PF_F64:
    case PF_I64: return 8;
    case PF_F32:
    case PF_I32: return 4;
    case PF_BF16:
    case PF_F16: return 2;
    default: return 1;
  }
}
