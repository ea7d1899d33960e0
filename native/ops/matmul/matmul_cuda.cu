#include "backends/cuda/gemm.h"
#include "ops/matmul/matmul.h"
#include "ops/pointwise/shape_text.h"

int32_t pf_cuda_matmul(const PfArgs* args) {
  MatmulShape s{};
  PF_TRY(GetMatmulShape(args, &s));
  PF_TRY(CheckMatmulFloats(args, "matmul", false));
  if (s.batch * s.m * s.n == 0) return PF_OK;
  const MatmulParams& params = PfParams<MatmulParams>(args);
  return Gemm(args, "matmul",
              {s.batch, s.m, s.n, s.k, s.a_batch, s.b_batch, s.trans_a, s.trans_b, args->in[0], args->in[1],
               args->in[2], args->in[3], args->out[0], static_cast<int32_t>(params.activation),
               params.accumulate != 0});
}

// Weights are read as they are: pack_bytes is 0 and nobody packs.
int32_t pf_cuda_matmul_pack(const PfArgs* args) {
  return Fail(args, PF_ERR_SHAPE,
              "matmul_pack: this device has no packed weights, received room for %lld bytes",
              static_cast<long long>(PfCount(args->out[0])));
}
int32_t pf_cuda_matmul_packed(const PfArgs* args) {
  return Fail(args, PF_ERR_OPTION,
              "matmul_packed: the weight was not packed by this device, which never does");
}
