#include "ops/euler/euler.h"
#include "ops/pointwise/blocks.h"

int32_t pf_cpu_euler(const PfArgs* a) {
  PF_TRY(CheckEuler(a));
  PF_TRY(NeedEulerTypes(a));
  const PfView &x = a->in[0], &cond = a->in[1], &uncond = a->in[2], &y = a->out[0];
  const EulerParams& p = PfParams<EulerParams>(a);
  const float step = static_cast<float>(p.delta_sigma), guidance = static_cast<float>(p.guidance);
  const bool guided = PfPresent(uncond);
  ForBlocks(PfCount(x), [&](int64_t at, int64_t n) {
    alignas(64) float bx[kBlock], bc[kBlock], bu[kBlock], by[kBlock];
    float* out = BeginWrite(y, at, by);
    const float *px = ReadBlock(x, at, n, bx), *pc = ReadBlock(cond, at, n, bc);
    if (guided)
      Map(n, px, pc, ReadBlock(uncond, at, n, bu), out,
          [=](Vf u, Vf c, Vf v) { return u + step * (v + guidance * (c - v)); });
    else
      Map(n, px, pc, out, [=](Vf u, Vf c) { return u + step * c; });
    EndWrite(y, at, n, out);
  });
  return PF_OK;
}
