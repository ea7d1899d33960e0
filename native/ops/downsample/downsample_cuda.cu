#include "ops/downsample/downsample.h"
#include "ops/downsample/pairs_cuda.h"

namespace {

// Odd sizes, which no published one is: taps are computed where they are used.
__global__ void __launch_bounds__(kElementThreads)
    BilinearKernel(FloatArray x, FloatArray y, Planes p, int64_t n, float scale) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at >= n) return;
  const int64_t w2 = p.w / 2, h2 = p.h / 2, plane = at / (w2 * h2), i = at / w2 % h2;
  const DownTap r = DownTapOf(i, p.h), c = DownTapOf(at % w2, p.w);
  const int64_t top = (plane * p.h + r.first) * p.w, low = (plane * p.h + r.second) * p.w;
  const float tr = static_cast<float>(r.t), tc = static_cast<float>(c.t);
  const float above = (1 - tc) * ReadOne(x, top + c.first) + tc * ReadOne(x, top + c.second);
  const float below = (1 - tc) * ReadOne(x, low + c.first) + tc * ReadOne(x, low + c.second);
  WriteOne(y, at, scale * ((1 - tr) * above + tr * below));
}

// Which output reads input i of a line of n, and with what weight; -1: none.
__device__ int64_t ReaderOf(int64_t i, int64_t n, float* weight) {
  for (int64_t k = i / 2 - 1; k <= i / 2 + 1; ++k) {
    if (k < 0 || k >= n / 2) continue;
    const DownTap tap = DownTapOf(k, n);
    if (tap.first != i && tap.second != i) continue;
    *weight = static_cast<float>((tap.first == i ? 1 - tap.t : 0) + (tap.second == i ? tap.t : 0));
    return k;
  }
  return -1;
}

__global__ void __launch_bounds__(kElementThreads)
    BilinearBackwardKernel(FloatArray dy, FloatArray dx, Planes p, int64_t n, float scale) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kElementThreads + threadIdx.x;
  if (at >= n) return;
  float row_weight = 0, column_weight = 0;
  const int64_t plane = at / (p.w * p.h);
  const int64_t i = ReaderOf(at / p.w % p.h, p.h, &row_weight), j = ReaderOf(at % p.w, p.w, &column_weight);
  const float value = i < 0 || j < 0 ? 0.0f : ReadOne(dy, (plane * (p.h / 2) + i) * (p.w / 2) + j);
  WriteOne(dx, at, scale * row_weight * column_weight * value);
}

}  // namespace

int32_t pf_cuda_downsample(const PfArgs* a) {
  Planes p = {};
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(MakePlanes(a, "downsample", x, y, &p));
  PF_TRY(NeedFloat(a, "downsample", "x", x));
  PF_TRY(NeedFloat(a, "downsample", "y", y));
  const float scale = static_cast<float>(PfParams<DownsampleParams>(a).scale);
  if (p.h % 2 == 0 && p.w % 2 == 0) return HalvePlanes(a, x, y, p.w / 2, 0.25f * scale);
  const int64_t n = PfCount(y);
  if (n == 0) return PF_OK;
  return Launch(a, &BilinearKernel, PairGrid(n, 1), kElementThreads, 0, ArrayOf(x), ArrayOf(y), p, n, scale);
}

int32_t pf_cuda_downsample_backward(const PfArgs* a) {
  Planes p = {};
  const PfView &dy = a->in[0], &dx = a->out[0];
  PF_TRY(MakePlanes(a, "downsample_backward", dx, dy, &p));
  PF_TRY(NeedFloat(a, "downsample_backward", "dy", dy));
  PF_TRY(NeedFloat(a, "downsample_backward", "dx", dx));
  const float scale = static_cast<float>(PfParams<DownsampleParams>(a).scale);
  if (p.h % 2 == 0 && p.w % 2 == 0) return DoublePlanes(a, dy, dx, p.w / 2, 0.25f * scale);
  const int64_t n = PfCount(dx);
  if (n == 0) return PF_OK;
  return Launch(a, &BilinearBackwardKernel, PairGrid(n, 1), kElementThreads, 0, ArrayOf(dy), ArrayOf(dx), p,
                n, scale);
}
