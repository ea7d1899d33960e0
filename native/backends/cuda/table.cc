// The op table of the CUDA backend, and of its twin that runs the same kernels in the emulator.
#include "backends/cuda/memory.h"

#ifndef PF_LEVEL_NAME
#define PF_LEVEL_NAME "cuda"
#endif

#ifdef PF_PARTIAL  // a development build of some op folders only: the missing kernels are null
#define PF_WEAK __attribute__((weak))
#else
#define PF_WEAK
#endif
#define PF_OP(folder, name, inputs, outputs, scalars) int32_t pf_cuda_##name(const PfArgs* args) PF_WEAK;
#include "ops.def"
#undef PF_OP

namespace {

const PfKernel kKernels[] = {
#define PF_OP(folder, name, inputs, outputs, scalars) pf_cuda_##name,
#include "ops.def"
#undef PF_OP
};

int32_t Init(int32_t, char*) { return PF_OK; }
size_t PackBytes(int64_t, int64_t, int32_t, int32_t) { return 0; }  // weights are read as they are

const PfBackendTable kTable = {PF_ABI_VERSION, PF_OP_COUNT, PF_LEVEL_NAME,  kKernels,
                               Init,           PackBytes,   &kDeviceMemory, DeviceProbe};

}  // namespace

PF_EXPORT const PfBackendTable* pf_backend() { return &kTable; }
