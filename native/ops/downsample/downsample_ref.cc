#include "backends/ref/ref.h"
#include "ops/downsample/downsample.h"

namespace {

// visit(large index, small index, weight) for every pair that bilinear halving connects.
template <class Visit>
void ForTaps(const Planes& p, Visit visit) {
  const int64_t h2 = p.h / 2, w2 = p.w / 2;
  for (int64_t f = 0; f < p.count; ++f) {
    for (int64_t i = 0; i < h2; ++i) {
      for (int64_t j = 0; j < w2; ++j) {
        const DownTap r = DownTapOf(i, p.h), c = DownTapOf(j, p.w);
        const int64_t small = (f * h2 + i) * w2 + j, top = (f * p.h + r.first) * p.w,
                      low = (f * p.h + r.second) * p.w;
        visit(top + c.first, small, (1 - r.t) * (1 - c.t));
        visit(top + c.second, small, (1 - r.t) * c.t);
        visit(low + c.first, small, r.t * (1 - c.t));
        visit(low + c.second, small, r.t * c.t);
      }
    }
  }
}

}  // namespace

int32_t pf_ref_downsample(const PfArgs* a) {
  Planes p;
  PF_TRY(MakePlanes(a, "downsample", a->in[0], a->out[0], &p));
  const double scale = PfParams<DownsampleParams>(a).scale;
  double sum = 0;
  int taps = 0;
  ForTaps(p, [&](int64_t large, int64_t small, double weight) {
    sum += weight * Get(a->in[0], large);
    if (++taps < 4) return;
    Set(a->out[0], small, scale * sum);
    sum = taps = 0;
  });
  return PF_OK;
}

int32_t pf_ref_downsample_backward(const PfArgs* a) {
  Planes p;
  PF_TRY(MakePlanes(a, "downsample_backward", a->out[0], a->in[0], &p));
  const double scale = PfParams<DownsampleParams>(a).scale;
  for (int64_t i = 0; i < PfCount(a->out[0]); ++i) Set(a->out[0], i, 0);
  ForTaps(p, [&](int64_t large, int64_t small, double weight) {
    Set(a->out[0], large, Get(a->out[0], large) + scale * weight * Get(a->in[0], small));
  });
  return PF_OK;
}
