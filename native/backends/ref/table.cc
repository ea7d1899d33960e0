// The op table of the reference backend: every op in plain double-precision loops, for tests only.
#include "core/op.h"

#ifdef PF_PARTIAL  // a development build of some op folders only: the missing kernels are null
#define PF_WEAK __attribute__((weak))
#else
#define PF_WEAK
#endif
#define PF_OP(folder, name, inputs, outputs, scalars) int32_t pf_ref_##name(const PfArgs* args) PF_WEAK;
#include "ops.def"
#undef PF_OP

namespace {

const PfKernel kKernels[] = {
#define PF_OP(folder, name, inputs, outputs, scalars) pf_ref_##name,
#include "ops.def"
#undef PF_OP
};

int32_t Init(int32_t, char*) { return PF_OK; }
// The reference's packed weight is [n, k] and the form as three int64 followed by the plain weight.
size_t PackBytes(int64_t n, int64_t k, int32_t dtype, int32_t) { return 24 + n * k * PfSize(dtype); }

const PfBackendTable kTable = {PF_ABI_VERSION, PF_OP_COUNT, "ref",   kKernels,
                               Init,           PackBytes,   nullptr, nullptr};

}  // namespace

PF_EXPORT const PfBackendTable* pf_backend() { return &kTable; }
