#include "ops/downsample/downsample.h"
#include "ops/downsample/downsample_pairs.cuh"

namespace {

// Odd heights or widths have taps of their own for every output; one thread an element.
struct Odd {
  FloatArray in, out;
  Planes planes;
  int64_t count;
  float scale;
};

__global__ void __launch_bounds__(kPairThreads) OddForward(Odd p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x;
  if (at >= p.count) return;
  const int64_t h = p.planes.h, w = p.planes.w, row = at / (w / 2), plane = row / (h / 2);
  const DownTap r = DownTapOf(row - plane * (h / 2), h), c = DownTapOf(at - row * (w / 2), w);
  const int64_t top = (plane * h + r.first) * w, low = (plane * h + r.second) * w;
  const float t = static_cast<float>(r.t), u = static_cast<float>(c.t);
  const float above = (1 - u) * ReadOne(p.in, top + c.first) + u * ReadOne(p.in, top + c.second);
  const float below = (1 - u) * ReadOne(p.in, low + c.first) + u * ReadOne(p.in, low + c.second);
  WriteOne(p.out, at, p.scale * ((1 - t) * above + t * below));
}

__global__ void __launch_bounds__(kPairThreads) OddBackward(Odd p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x;
  if (at >= p.count) return;
  const int64_t h = p.planes.h, w = p.planes.w, row = at / w, plane = row / h;
  const DownTarget r = DownTargetOf(row - plane * h, h), c = DownTargetOf(at - row * w, w);
  float dx = 0;
  if (r.output >= 0 && c.output >= 0)
    dx = p.scale * static_cast<float>(r.weight) * static_cast<float>(c.weight) *
         ReadOne(p.in, (plane * (h / 2) + r.output) * (w / 2) + c.output);
  WriteOne(p.out, at, dx);
}

int32_t LaunchOdd(const PfArgs* a, void (*kernel)(Odd), const Planes& planes, float scale) {
  const Odd p{ArrayOf(a->in[0]), ArrayOf(a->out[0]), planes, PfCount(a->out[0]), scale};
  if (p.count == 0) return PF_OK;
  return Launch(a, kernel, static_cast<unsigned>(CeilDiv(p.count, kPairThreads)), kPairThreads, 0, p);
}

}  // namespace

int32_t pf_cuda_downsample(const PfArgs* a) {
  Planes p;
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(MakePlanes(a, "downsample", x, y, &p));
  PF_TRY(NeedFloat(a, "downsample", "x", x));
  PF_TRY(NeedFloat(a, "downsample", "y", y));
  const float scale = static_cast<float>(PfParams<DownsampleParams>(a).scale);
  if (p.h % 2 == 0 && p.w % 2 == 0) return HalvePlanes(a, x, y, 0.25f * scale);
  return LaunchOdd(a, &OddForward, p, scale);
}

int32_t pf_cuda_downsample_backward(const PfArgs* a) {
  Planes p;
  const PfView &dy = a->in[0], &dx = a->out[0];
  PF_TRY(MakePlanes(a, "downsample_backward", dx, dy, &p));
  PF_TRY(NeedFloat(a, "downsample_backward", "dy", dy));
  PF_TRY(NeedFloat(a, "downsample_backward", "dx", dx));
  const float scale = static_cast<float>(PfParams<DownsampleParams>(a).scale);
  if (p.h % 2 == 0 && p.w % 2 == 0) return DoublePlanes(a, dy, dx, 0.25f * scale);
  return LaunchOdd(a, &OddBackward, p, scale);
}
