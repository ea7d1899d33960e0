#include "ops/downsample/downsample.h"
#include "ops/downsample/pairs.h"

namespace {

// The taps of one axis, and for the way back which output each input feeds and with what weight.
struct Axis {
  int32_t *first, *second, *target;  // target is -1 for an input that no output reads
  float *t, *weight;
};

bool MakeAxis(const PfArgs* a, int64_t n, Axis* axis) {
  char* p = static_cast<char*>(a->context->scratch(a->context, n * 20));
  if (!p) return false;
  axis->first = reinterpret_cast<int32_t*>(p);
  axis->second = axis->first + n;
  axis->target = axis->second + n;
  axis->t = reinterpret_cast<float*>(axis->target + n);
  axis->weight = axis->t + n;
  for (int64_t i = 0; i < n; ++i) {
    const DownTarget target = DownTargetOf(i, n);
    axis->target[i] = static_cast<int32_t>(target.output);
    axis->weight[i] = static_cast<float>(target.weight);
  }
  for (int64_t i = 0; i < n / 2; ++i) {
    const DownTap tap = DownTapOf(i, n);
    axis->first[i] = static_cast<int32_t>(tap.first);
    axis->second[i] = static_cast<int32_t>(tap.second);
    axis->t[i] = static_cast<float>(tap.t);
  }
  return true;
}

template <class T>
void Forward(const Planes& p, const Axis& rows, const Axis& columns, float scale, const T* x,
             const PfView& y) {
  const int64_t h2 = p.h / 2, w2 = p.w / 2;
  ForTasks(p.count * h2, p.count * p.h * p.w, [&](int64_t task) {
    alignas(64) float buffer[kBlock];
    const int64_t f = task / h2, i = task % h2;
    const T *top = x + (f * p.h + rows.first[i]) * p.w, *low = x + (f * p.h + rows.second[i]) * p.w;
    const float t = rows.t[i];
    for (int64_t c = 0; c < w2; c += kBlock) {
      const int64_t n = MinOf(kBlock, w2 - c);
      float* out = BeginWrite(y, task * w2 + c, buffer);
      for (int64_t j = 0; j < n; ++j) {
        const int32_t l = columns.first[c + j], r = columns.second[c + j];
        const float u = columns.t[c + j];
        const float above = (1 - u) * ToFloat(top[l]) + u * ToFloat(top[r]);
        const float below = (1 - u) * ToFloat(low[l]) + u * ToFloat(low[r]);
        out[j] = scale * ((1 - t) * above + t * below);
      }
      EndWrite(y, task * w2 + c, n, out);
    }
  });
}

template <class T>
void Backward(const Planes& p, const Axis& rows, const Axis& columns, float scale, const T* dy,
              const PfView& dx) {
  const int64_t h2 = p.h / 2, w2 = p.w / 2;
  ForTasks(p.count * p.h, p.count * p.h * p.w, [&](int64_t task) {
    alignas(64) float buffer[kBlock];
    const int64_t f = task / p.h, i = task % p.h;
    const bool read = rows.target[i] >= 0;
    const T* from = dy + (f * h2 + (read ? rows.target[i] : 0)) * w2;
    const float weight = scale * rows.weight[i];
    for (int64_t c = 0; c < p.w; c += kBlock) {
      const int64_t n = MinOf(kBlock, p.w - c);
      float* out = BeginWrite(dx, task * p.w + c, buffer);
      for (int64_t j = 0; j < n; ++j) {
        const int32_t k = columns.target[c + j];
        out[j] = read && k >= 0 ? weight * columns.weight[c + j] * ToFloat(from[k]) : 0.0f;
      }
      EndWrite(dx, task * p.w + c, n, out);
    }
  });
}

}  // namespace

int32_t pf_cpu_downsample(const PfArgs* a) {
  Planes p;
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(MakePlanes(a, "downsample", x, y, &p));
  PF_TRY(NeedFloat(a, "downsample", "x", x));
  PF_TRY(NeedFloat(a, "downsample", "y", y));
  const float scale = static_cast<float>(PfParams<DownsampleParams>(a).scale);
  if (p.h % 2 == 0 && p.w % 2 == 0) {
    HalvePlanes(x, y, p.count * (p.h / 2), p.w / 2, 0.25f * scale);
    return PF_OK;
  }
  Axis rows, columns;
  if (!MakeAxis(a, p.h, &rows) || !MakeAxis(a, p.w, &columns))
    return Fail(a, PF_ERR_MEMORY, "downsample: no scratch memory");
  PF_FLOAT_DISPATCH(x, T, Forward(p, rows, columns, scale, PfData<T>(x), y););
  return PF_OK;
}

int32_t pf_cpu_downsample_backward(const PfArgs* a) {
  Planes p;
  const PfView &dy = a->in[0], &dx = a->out[0];
  PF_TRY(MakePlanes(a, "downsample_backward", dx, dy, &p));
  PF_TRY(NeedFloat(a, "downsample_backward", "dy", dy));
  PF_TRY(NeedFloat(a, "downsample_backward", "dx", dx));
  const float scale = static_cast<float>(PfParams<DownsampleParams>(a).scale);
  if (p.h % 2 == 0 && p.w % 2 == 0) {
    DoublePlanes(dy, dx, p.count * (p.h / 2), p.w / 2, 0.25f * scale);
    return PF_OK;
  }
  Axis rows, columns;
  if (!MakeAxis(a, p.h, &rows) || !MakeAxis(a, p.w, &columns))
    return Fail(a, PF_ERR_MEMORY, "downsample_backward: no scratch memory");
  PF_FLOAT_DISPATCH(dy, T, Backward(p, rows, columns, scale, PfData<T>(dy), dx););
  return PF_OK;
}
