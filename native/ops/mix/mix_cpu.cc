#include "ops/mix/mix.h"
#include "ops/pointwise/blocks.h"

namespace {

// nullptr stands for zeros.
template <class T>
void MixBlock(int64_t n, const T* a, const T* b, float s, T* y) {
  const float rest = 1.0f - s;
  if (a && b)
    MapStored(
        n, y, [=](Vf u, Vf v) { return s * u + rest * v; }, a, b);
  else if (a)
    MapStored(
        n, y, [=](Vf u) { return s * u; }, a);
  else if (b)
    MapStored(
        n, y, [=](Vf v) { return rest * v; }, b);
  else
    memset(y, 0, n * sizeof(T));
}

}  // namespace

int32_t pf_cpu_mix(const PfArgs* args) {
  PF_TRY(CheckMix(args));
  PF_TRY(NeedMixTypes(args));
  const PfView &a = args->in[0], &b = args->in[1], &sigma = args->in[2], &y = args->out[0];
  const int64_t n = PfProduct(y, 1, y.rank), blocks = (n + kBlock - 1) / kBlock;
  const bool has_a = PfPresent(a), has_b = PfPresent(b), direct = OneType(y, a, b);
  ForTasks(y.dims[0] * blocks, PfCount(y), [&](int64_t task) {
    const int64_t c = task % blocks * kBlock, m = MinOf(kBlock, n - c), at = task / blocks * n + c;
    const float s = PfData<float>(sigma)[task / blocks];
    if (direct) {
      PF_FLOAT_DISPATCH(y, T, {
        MixBlock(m, has_a ? PfData<T>(a) + at : nullptr, has_b ? PfData<T>(b) + at : nullptr, s,
                 PfData<T>(y) + at);
      });
      return;
    }
    alignas(64) float ba[kBlock], bb[kBlock], by[kBlock];
    float* out = BeginWrite(y, at, by);
    MixBlock(m, has_a ? ReadBlock(a, at, m, ba) : nullptr, has_b ? ReadBlock(b, at, m, bb) : nullptr, s, out);
    EndWrite(y, at, m, out);
  });
  return PF_OK;
}
