#include "backends/cuda/elementwise.h"
#include "ops/patchify/patchify.h"

namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 32, kChannels = 16;  // of a tile: 64 pixels side by side, 16 channels of a token

struct Patchify {
  FloatArray latent, rows;
  Patches patches;
};

// A block moves a tile of one image row of tokens through shared memory, so that both sides are walked along
// their memory.
template <bool kToRows>
__global__ void __launch_bounds__(kThreads) PatchifyKernel(Patchify p) {
  __shared__ float tile[4 * kChannels][kTokens + 1];  // [part, channel][token]
  const Patches& s = p.patches;
  const int64_t across = (s.w + kTokens - 1) / kTokens, deep = (s.c + kChannels - 1) / kChannels;
  const int64_t image_row = blockIdx.x / (across * deep), rest = blockIdx.x - image_row * across * deep;
  const int64_t j0 = rest / deep * kTokens, c0 = (rest - rest / deep * deep) * kChannels;
  const int tokens = static_cast<int>(s.w - j0 < kTokens ? s.w - j0 : kTokens);
  const int channels = static_cast<int>(s.c - c0 < kChannels ? s.c - c0 : kChannels);
  // The divisions of these two are by sizes and stay out of the loops.
  const int64_t plane = s.Element(image_row, 1) - s.Element(image_row, 0);
  const int64_t corner = s.Element(image_row, c0) + 2 * j0, row = (s.Row(image_row) + j0) * 4 * s.c + c0;
  // visit(element, value in the tile) along the latents, and along the rows
  const auto latents = [&](auto visit) {
    for (int i = threadIdx.x; i < channels * 4 * kTokens; i += kThreads) {
      const int x = i % (2 * kTokens), line = i / (2 * kTokens), c = line / 2, y = line % 2;
      if (x < 2 * tokens)
        visit(corner + c * plane + y * 2 * s.w + x, tile[(2 * y + x % 2) * kChannels + c][x / 2]);
    }
  };
  const auto rows = [&](auto visit) {
    for (int i = threadIdx.x; i < tokens * 4 * kChannels; i += kThreads) {
      const int c = i % kChannels, part = i / kChannels % 4, j = i / (4 * kChannels);
      if (c < channels) visit(row + (4 * j + part) * s.c + c, tile[part * kChannels + c][j]);
    }
  };
  const auto read = [](const FloatArray& from) {
    return [=](int64_t at, float& value) { value = ReadOne(from, at); };
  };
  const auto write = [](const FloatArray& to) {
    return [=](int64_t at, float value) { WriteOne(to, at, value); };
  };
  if (kToRows)
    latents(read(p.latent));
  else
    rows(read(p.rows));
  __syncthreads();
  if (kToRows)
    rows(write(p.rows));
  else
    latents(write(p.latent));
}

template <bool kToRows>
int32_t LaunchPatchify(const PfArgs* a, const char* op, const PfView& latent, const PfView& rows) {
  Patchify p{ArrayOf(latent), ArrayOf(rows), {}};
  PF_TRY(MakePatches(a, op, latent, rows, &p.patches));
  PF_TRY(NeedFloat(a, op, "x", a->in[0]));
  PF_TRY(NeedFloat(a, op, "y", a->out[0]));
  if (PfCount(latent) == 0) return PF_OK;
  const Patches& s = p.patches;
  const int64_t blocks = s.b * s.t * s.h * CeilDiv(s.w, kTokens) * CeilDiv(s.c, kChannels);
  return Launch(a, &PatchifyKernel<kToRows>, static_cast<unsigned>(blocks), kThreads, 0, p);
}

}  // namespace

int32_t pf_cuda_patchify(const PfArgs* a) { return LaunchPatchify<true>(a, "patchify", a->in[0], a->out[0]); }
int32_t pf_cuda_unpatchify(const PfArgs* a) {
  return LaunchPatchify<false>(a, "unpatchify", a->out[0], a->in[0]);
}
