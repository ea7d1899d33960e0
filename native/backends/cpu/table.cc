// The op table of one CPU level. The same file is built once per level; PF_LEVEL_NAME tells which.
#include <omp.h>

#include "backends/cpu/onednn.h"
#include "core/op.h"
#include "ops/matmul/int8_layout.h"

#ifdef PF_PARTIAL  // a development build of some op folders only: the missing kernels are null
#define PF_WEAK __attribute__((weak))
#else
#define PF_WEAK
#endif
#define PF_OP(folder, name, inputs, outputs, scalars) int32_t pf_cpu_##name(const PfArgs* args) PF_WEAK;
#include "ops.def"
#undef PF_OP

namespace {

const PfKernel kKernels[] = {
#define PF_OP(folder, name, inputs, outputs, scalars) pf_cpu_##name,
#include "ops.def"
#undef PF_OP
};

int32_t Init(int32_t threads, char* error) {
  omp_set_num_threads(threads);
  return OnednnInit(PF_LEVEL_NAME, error);
}

size_t PackBytes(int64_t n, int64_t k, int32_t dtype, int32_t form) {
  return form == PF_PACK_INT8 ? Int8PackBytes(n, k) : OnednnPackBytes(n, k, dtype);
}

const PfBackendTable kTable = {PF_ABI_VERSION, PF_OP_COUNT, PF_LEVEL_NAME, kKernels,
                               Init,           PackBytes,   nullptr,       nullptr};

}  // namespace

PF_EXPORT const PfBackendTable* pf_backend() { return &kTable; }
