#include "backends/ref/ref.h"
#include "ops/patchify/patchify.h"

namespace {

template <class Visit>
void ForPatches(const Patches& p, Visit visit) {
  for (int64_t b = 0; b < p.b; ++b)
    for (int64_t c = 0; c < p.c; ++c)
      for (int64_t t = 0; t < p.t; ++t)
        for (int64_t y = 0; y < 2 * p.h; ++y)
          for (int64_t x = 0; x < 2 * p.w; ++x) {
            const int64_t row = p.row_offset + b * p.row_stride + (t * p.h + y / 2) * p.w + x / 2;
            visit((((b * p.c + c) * p.t + t) * 2 * p.h + y) * 2 * p.w + x,
                  row * 4 * p.c + (y % 2 * 2 + x % 2) * p.c + c);
          }
}

}  // namespace

int32_t pf_ref_patchify(const PfArgs* a) {
  Patches p;
  PF_TRY(MakePatches(a, "patchify", a->in[0], a->out[0], &p));
  ForPatches(p, [&](int64_t latent, int64_t row) { Set(a->out[0], row, Get(a->in[0], latent)); });
  return PF_OK;
}

int32_t pf_ref_unpatchify(const PfArgs* a) {
  Patches p;
  PF_TRY(MakePatches(a, "unpatchify", a->out[0], a->in[0], &p));
  ForPatches(p, [&](int64_t latent, int64_t row) { Set(a->out[0], latent, Get(a->in[0], row)); });
  return PF_OK;
}
