#include "ops/euler/euler.h"
#include "ops/pointwise/blocks.h"

namespace {

struct EulerStep {
  float size, guidance;

  // Without guidance `uncond` is nullptr.
  template <class T>
  void Block(int64_t n, const T* x, const T* cond, const T* uncond, T* y) const {
    const float step = size, scale = guidance;
    if (uncond)
      MapStored(
          n, y, [=](Vf u, Vf c, Vf v) { return u + step * (v + scale * (c - v)); }, x, cond, uncond);
    else
      MapStored(
          n, y, [=](Vf u, Vf c) { return u + step * c; }, x, cond);
  }
};

}  // namespace

int32_t pf_cpu_euler(const PfArgs* a) {
  PF_TRY(CheckEuler(a));
  PF_TRY(NeedEulerTypes(a));
  const PfView &x = a->in[0], &cond = a->in[1], &uncond = a->in[2], &y = a->out[0];
  const EulerParams& p = PfParams<EulerParams>(a);
  const EulerStep step{static_cast<float>(p.delta_sigma), static_cast<float>(p.guidance)};
  const bool guided = PfPresent(uncond), direct = OneType(y, x, cond, uncond);
  ForBlocks(PfCount(x), [&](int64_t at, int64_t n) {
    if (direct) {
      PF_FLOAT_DISPATCH(y, T, {
        step.Block(n, PfData<T>(x) + at, PfData<T>(cond) + at, guided ? PfData<T>(uncond) + at : nullptr,
                   PfData<T>(y) + at);
      });
      return;
    }
    alignas(64) float bx[kBlock], bc[kBlock], bu[kBlock], by[kBlock];
    float* out = BeginWrite(y, at, by);
    step.Block(n, ReadBlock(x, at, n, bx), ReadBlock(cond, at, n, bc),
               guided ? ReadBlock(uncond, at, n, bu) : nullptr, out);
    EndWrite(y, at, n, out);
  });
  return PF_OK;
}
