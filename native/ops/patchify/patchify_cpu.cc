#include "ops/patchify/patchify.h"
#include "ops/pointwise/blocks.h"

// One image row of tokens is a task: it touches 2 latent rows of every channel and a run of whole token rows,
// which stay in cache whichever of the two sides is walked with a stride. Latents are small; no further
// blocking pays.

namespace {

template <class X, class Y>
void Patchify(const Patches& p, const X* x, Y* y) {
  ForTasks(p.b * p.t * p.h, p.b * p.t * p.h * p.w * p.c * 4, [&](int64_t i) {
    Y* row = y + p.Row(i) * 4 * p.c;
    const int64_t channel = p.t * 4 * p.h * p.w;
    for (int64_t j = 0; j < p.w; ++j, row += 4 * p.c) {
      for (int64_t part = 0; part < 4; ++part) {
        const X* from = x + p.Element(i, 0) + part / 2 * 2 * p.w + 2 * j + part % 2;
        for (int64_t c = 0; c < p.c; ++c) row[part * p.c + c] = FromFloat<Y>(ToFloat(from[c * channel]));
      }
    }
  });
}

template <class X, class Y>
void Unpatchify(const Patches& p, const X* x, Y* y) {
  ForTasks(p.b * p.t * p.h, p.b * p.t * p.h * p.w * p.c * 4, [&](int64_t i) {
    const X* row = x + p.Row(i) * 4 * p.c;
    for (int64_t c = 0; c < p.c; ++c) {
      for (int64_t part = 0; part < 4; ++part) {
        Y* to = y + p.Element(i, c) + part / 2 * 2 * p.w + part % 2;
        const X* from = row + part * p.c + c;
        for (int64_t j = 0; j < p.w; ++j) to[2 * j] = FromFloat<Y>(ToFloat(from[j * 4 * p.c]));
      }
    }
  });
}

}  // namespace

int32_t pf_cpu_patchify(const PfArgs* a) {
  Patches p;
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(MakePatches(a, "patchify", x, y, &p));
  PF_TRY(NeedFloat(a, "patchify", "x", x));
  PF_TRY(NeedFloat(a, "patchify", "y", y));
  PF_FLOAT_DISPATCH(x, X, PF_FLOAT_DISPATCH(y, Y, Patchify(p, PfData<X>(x), PfData<Y>(y));););
  return PF_OK;
}

int32_t pf_cpu_unpatchify(const PfArgs* a) {
  Patches p;
  const PfView &x = a->in[0], &y = a->out[0];
  PF_TRY(MakePatches(a, "unpatchify", y, x, &p));
  PF_TRY(NeedFloat(a, "unpatchify", "x", x));
  PF_TRY(NeedFloat(a, "unpatchify", "y", y));
  PF_FLOAT_DISPATCH(x, X, PF_FLOAT_DISPATCH(y, Y, Unpatchify(p, PfData<X>(x), PfData<Y>(y));););
  return PF_OK;
}
